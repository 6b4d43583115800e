"""Matrix products in float32 on a CPU, through oneDNN.

PyTorch has two libraries for them and in float32 takes MKL. On the AMD processor that we have (two cores) MKL makes 200
GFLOP/s and oneDNN 400, and for a single row MKL reads weights at 17 GB/s and oneDNN at 40. No other was measured.
What is not float32 on a CPU goes to `F.linear`.
"""

import contextlib
import ctypes
import platform
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

HAS_ONEDNN = (torch.backends.mkldnn.is_available() and platform.machine().lower() in ("x86_64", "amd64")
              and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias. x: (…, in), weight: (out, in), bias: (out,); the result is (…, out)."""
    if not (HAS_ONEDNN and x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel()) \
            or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return OneDNNLinear.apply(x, weight, bias)
    return product(x, weight, bias)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`linear` in oneDNN, without gradients."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class OneDNNLinear(torch.autograd.Function):
    """`product` with gradients, which are products too."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)  # (N, out)
        return (product(grad, weight.T), product(rows.T, x.flatten(0, -2).T), rows.sum(0) if ctx.has_bias else None)


class Linear(nn.Linear):
    """nn.Linear through `linear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)


def keep_freed_memory() -> None:
    """Have the C library keep the memory of freed tensors for the next step, where it is glibc.

    It would give large pieces back to the system, and touching fresh pages takes longer than most operations: a step of
    GPT-2 124M (batch 4 x 256, two cores) took 3.6 s, and takes 3.0 s at 5% more memory.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no piece comes from the system by itself
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give back the end of the heap
