"""Select the device, the autocast dtype and torch.compile."""

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
    """Return the device `name`; "auto": CUDA, else MPS, else the CPU. Raises UserError if it is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device_type for device_type, found in available.items() if found))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"unknown device {name!r}: expected auto, cuda, cuda:0, mps or cpu") from None
    if not available.get(device.type, False):
        found = ", ".join(device_type for device_type, found in available.items() if found)
        raise UserError(f"device {name!r} is not available (PyTorch {torch.__version__} found {found}): pass --device "
                        f"auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device {name!r} is not available: pass an index below {torch.cuda.device_count()}, the "
                        f"number of GPUs")
    return device


def select_precision(name: Precision, device: torch.device) -> Precision:
    """Return "bf16", "fp16" or "float32"; "auto" selects a 16-bit dtype if `device` supports one natively.

    That is bf16 on CUDA GPUs from Ampere on (compute capability 8.0) and on CPUs with AVX512-BF16 or AMX; fp16, which
    needs a GradScaler, on older GPUs; float32 elsewhere: on CPUs that only emulate it, bf16 is several times slower.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    cpu = torch.cpu.get_capabilities()
    native = device.type == "cpu" and (cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    return "bf16" if native else "float32"


def select_compile(setting: bool | str, device: torch.device) -> tuple[bool, str]:
    """Return whether to use torch.compile and, if "auto" disables it only for lack of a compiler, the reason; else "".

    "auto" compiles on CUDA GPUs from Volta on (compute capability 7.0) if there is a compiler. On CPUs it gains little
    and slows small models down. Raises UserError if `setting` is true and there is no compiler.
    """
    if setting is False or setting == "auto" and (
            device.type != "cuda" or torch.cuda.get_device_capability(device) < (7, 0)):
        return False, ""
    missing = missing_for_compile(device)
    if missing and setting is True:
        raise UserError(f"--compile true needs {missing}: install it, or pass --compile false")
    return not missing, f"torch.compile is off: it needs {missing}" if missing else ""


def missing_for_compile(device: torch.device) -> str:
    """Return what this machine lacks for torch.compile, "" if nothing; slim containers have no compiler."""
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
    """Return the GPU's name or the CPU's capability: results are bitwise equal only on equal hardware."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether `error` is an out-of-memory error of a device or of the CPU allocator."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error) for text in ("out of memory", "not enough memory", "can't allocate memory"))


def tune_device(device: torch.device) -> None:
    """Allow TF32 for float32 matmuls on CUDA; on a CPU, make glibc keep freed memory for reuse.

    By default glibc returns large blocks to the system, and every step waits for new pages. Keeping them makes training
    10 to 30% faster and takes 5% more memory. Other C libraries are left alone.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    elif device.type == "cpu":
        with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0)  # M_MMAP_MAX: never allocate with mmap
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
