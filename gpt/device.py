"""Select the device, the autocast dtype, torch.compile and the micro-batch that fits."""

import contextlib
import ctypes
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn as nn

from gpt.errors import UserError

Precision = Literal["auto", "bf16", "fp16", "float32"]  # the dtype of autocast
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}


def select_device(name: str) -> torch.device:
    """Return the device `name`; "auto": CUDA, else MPS, else the CPU. Raises UserError if it is not
    available."""
    available = []
    if torch.cuda.is_available():
        available += ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        available.append("mps")
    available.append("cpu")
    if name == "auto":
        return torch.device(available[0])
    if name not in available:
        raise UserError(f"device {name!r} is not available: PyTorch {torch.__version__} found "
                        f"{', '.join(available)}")
    device = torch.device(name)
    if device.index is not None:
        torch.cuda.set_device(device)  # for calls without a device argument
    return device


def select_precision(name: Precision, device: torch.device) -> Precision:
    """Return "bf16", "fp16" or "float32"; "auto" selects a 16-bit dtype if `device` supports one
    natively.

    That is bf16 on CUDA GPUs from Ampere on (compute capability 8.0) and on CPUs with AVX512-BF16
    or AMX; fp16, which needs a GradScaler, on older GPUs; float32 elsewhere: on CPUs that only
    emulate it, bf16 is several times slower.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    cpu = torch.cpu.get_capabilities()
    is_native = device.type == "cpu" and (cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    return "bf16" if is_native else "float32"


def select_compile(setting: bool | Literal["auto"], device: torch.device) -> bool:
    """Return whether to use torch.compile. "auto": on CUDA GPUs from Volta on (compute capability
    7.0), if Triton and a C compiler are installed; small models on CPUs gain nothing from it."""
    if setting != "auto":
        return setting
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (7, 0):
        return False
    compilers = os.environ.get("CC", "gcc clang").split()
    return any(map(shutil.which, compilers)) and importlib.util.find_spec("triton") is not None


def find_micro_batch_size(n_sequences: int, sizes: Iterable[int],
                          fits: Callable[[int], bool]) -> int:
    """Return the first of the `sizes` that divides `n_sequences` and `fits`; 1 if none does."""
    for size in sizes:
        if n_sequences % size == 0 and fits(size):
            return size
    return 1


def fits_in_memory(model: nn.Module, autocast: contextlib.AbstractContextManager, B: int,
                   T: int) -> bool:
    """Return whether a forward and backward pass of `model` on B sequences of T tokens fits into
    the free memory of its GPU, beside what training allocates later and with a tenth to spare."""
    device = next(model.parameters()).device
    n_parameters = sum(parameter.numel() for parameter in model.parameters())

    def run_step() -> None:
        spare = torch.cuda.mem_get_info(device)[0] // 10
        # In float32: two moments of AdamW and the buckets of DistributedDataParallel.
        _later = torch.empty(3 * 4 * n_parameters + spare, dtype=torch.uint8, device=device)
        tokens = torch.zeros(B, T, dtype=torch.int64, device=device)
        with autocast:
            loss = model(tokens, tokens)
        loss.backward()

    try:
        run_step()
        fits = True
    except RuntimeError:  # cuBLAS and cuDNN raise other errors than OutOfMemoryError
        fits = False
    model.zero_grad()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return fits


def use_deterministic_algorithms() -> None:
    """Make a GPU compute the same bits in every run. Call it before any other use of CUDA.

    See PyTorch's notes on reproducibility; for this, cuBLAS needs workspaces of a fixed size.
    """
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    # No kernel here reads uninitialized memory, and filling it takes time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's capability, such as AVX512."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def tune_device(device: torch.device) -> None:
    """Allow TF32 for float32 matmuls on CUDA; on a CPU, make glibc keep freed memory for reuse.

    By default glibc returns large blocks to the system, and every step waits for new pages. Keeping
    them makes training 10 to 30% faster and takes 5% more memory. Other C libraries are left alone.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    elif device.type == "cpu":
        with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
            libc = ctypes.CDLL(None)
            libc.mallopt(-4, 0)  # M_MMAP_MAX: never allocate with mmap
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
