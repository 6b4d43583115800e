"""How much work training is, and how fast the device could do it: MFU, the share of that speed which is reached."""

import time

import torch

from gpt.config import GPTConfig
from gpt.linear import linear


def flops_per_token(config: GPTConfig, num_parameters: int, seq_len: int) -> int:
    """Floating-point operations of the matrix products that training on one token takes.

    6 N + 12 L H Q T (Chowdhery et al. 2022, "PaLM", appendix B): N parameters, L layers, H heads of size Q, windows of
    T tokens. The second term is attention over whole windows, as is usual, though a causal model needs half of it.
    """
    return 6 * num_parameters + 12 * config.n_layer * config.n_embd * seq_len


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of large matrix products on `device` (all its threads, if it is a CPU), as
    measured here and now with what the model uses: the best of a tenth of a second."""
    n = 1024 if device.type == "cpu" else 8192 if dtype != torch.float32 else 4096
    generator = torch.Generator(device).manual_seed(0)  # not the one that a run draws from
    a, b = torch.randn(2, n, n, device=device, dtype=dtype, generator=generator)
    times: list[float] = []
    while len(times) < 6 or sum(times) < 0.1:  # the first one warms up
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        product = linear(a, b)
        product[0, 0].item()  # waits for it
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times[1:])
