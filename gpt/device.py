"""Choose what a run computes on and in: device, autocast dtype, torch.compile."""

import contextlib
import ctypes
import importlib.util
import os
import shutil
import sysconfig
from pathlib import Path
from typing import Literal

import torch

from gpt.errors import UserError

Precision = Literal["auto", "bf16", "fp16", "float32"]  # the dtype of autocast
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}


def select_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" takes CUDA, else MPS, else the CPU. Raises UserError if it is missing."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device_type for device_type, found in available.items() if found))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}: expected auto, cuda, cuda:0, mps or cpu") from None
    if not available.get(device.type, False):
        found = ", ".join(device_type for device_type, found in available.items() if found)
        raise UserError(f"device {name!r} is not available: PyTorch {torch.__version__} sees {found}; pass --device "
                        f"auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r} is not available: this machine has {torch.cuda.device_count()} GPUs, counted "
                        f"from cuda:0")
    return device


def select_precision(name: Precision, device: torch.device) -> Precision:
    """Return "bf16", "fp16" or "float32"; "auto" takes what `device` computes natively.

    That is bf16 on CUDA GPUs from Ampere on (compute capability 8.0) and on CPUs with AVX512-BF16 or AMX; fp16, which
    needs a GradScaler, on older GPUs; float32 elsewhere: a CPU that only emulates bf16 is several times slower in it.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    cpu = torch.cpu.get_capabilities()
    native = device.type == "cpu" and (cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    return "bf16" if native else "float32"


def select_compile(setting: bool | str, device: torch.device) -> tuple[bool, str]:
    """Return whether to use torch.compile, and why not if "auto" would have liked to.

    "auto" compiles on CUDA GPUs from Volta on (compute capability 7.0) if there is a compiler. On CPUs it gains little
    and small models lose. Raises UserError if `setting` is true and there is no compiler.
    """
    if setting is False or setting == "auto" and (
            device.type != "cuda" or torch.cuda.get_device_capability(device) < (7, 0)):
        return False, ""
    missing = missing_for_compile(device)
    if missing and setting is True:
        raise UserError(f"--compile true needs {missing}: install it, or pass --compile false")
    return not missing, f"torch.compile is off: it needs {missing}" if missing else ""


def missing_for_compile(device: torch.device) -> str:
    """Return what torch.compile needs and this machine lacks, "" if nothing; slim containers have no compiler."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "Triton"
    variable, names = ("CC", ["gcc", "clang"]) if device.type == "cuda" else ("CXX", ["g++", "clang++"])
    compilers = os.environ.get(variable, "").split()[:1] or names
    if not any(map(shutil.which, compilers)):
        return f"a C compiler ({' or '.join(compilers)})"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python's headers (Python.h, from python3-dev)"
    return ""


def hardware_name(device: torch.device) -> str:
    """Return the name of the hardware: only equal hardware can be expected to agree in the last bit."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether `error` is a device's or the CPU allocator's way to say that memory is exhausted."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error) for text in ("out of memory", "not enough memory", "can't allocate memory"))


def tune_device(device: torch.device) -> None:
    """Allow TF32 for what is left in float32 on CUDA; on a CPU make glibc keep the memory of freed tensors.

    By default glibc returns large blocks to the system and the next step waits for fresh pages: without that, training
    is 10 to 30% faster at 5% more memory. Other C libraries are left as they are.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    elif device.type == "cpu":
        with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0)  # M_MMAP_MAX: take no block from the system by itself
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never return the end of the heap
