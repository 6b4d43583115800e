"""FLOPs per token and the device's peak FLOP/s, for MFU:
the fraction of the peak that training reaches."""

import re
import time

import torch
import torch.nn.functional as F

from gpt.config import GPTConfig

# Dense peak FLOP/s from NVIDIA's datasheets: bf16 with float32 accumulation,
# fp16 on the two GPUs without bf16.
DATASHEET_PEAKS = {
    "A100": 312e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200 NVL": 835e12,
    "H200": 989e12, "L4": 121e12, "L40S": 362e12, "RTX 3090": 71e12, "RTX 4090": 165.2e12,
    "RTX 5090": 209.5e12, "T4": 65e12, "V100-PCIE": 112e12, "V100": 125e12}


def flops_per_token(config: GPTConfig, num_parameters: int, seq_len: int) -> int:
    """Return the FLOPs of all matmuls in a forward and backward pass, per token.

    6 N + 12 L H Q T (Chowdhery et al. 2022, "PaLM", appendix B): N parameters, L layers, H heads of
    size Q, sequences of T tokens. The second term is attention over whole sequences, as is usual,
    although causal attention needs half.
    """
    return 6 * num_parameters + 12 * config.n_layer * config.n_embd * seq_len


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Return the peak FLOP/s for MFU and its source: the GPU's datasheet if known,
    else a matmul timed in `dtype`."""
    if device.type == "cuda" and (peak := datasheet_peak(torch.cuda.get_device_name(device))):
        return peak
    return measured_peak_flops(device, dtype), "measured"


def datasheet_peak(gpu_name: str) -> tuple[float, str] | None:
    """Return the dense 16-bit peak of a GPU in FLOP/s and the datasheet's name;
    None if it is not in the table."""
    for name, peak in DATASHEET_PEAKS.items():
        # Variants with the same number, such as laptop GPUs, and MIG slices have other peaks.
        if re.search(rf"\b{name}\b(?! (Ti|D|SUPER|Laptop|Max-Q))(?!.* MIG )", gpu_name):
            return peak, f"datasheet of {name}"
    return None


def measured_peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of the fastest of several large matmuls on `device`
    (a CPU: on all of PyTorch's threads)."""
    n = 1024 if device.type == "cpu" else 8192 if dtype != torch.float32 else 4096
    generator = torch.Generator(device).manual_seed(0)  # keeps the run's random state
    a, b = torch.randn(2, n, n, device=device, dtype=dtype, generator=generator)
    times: list[float] = []
    while len(times) < 6 or sum(times) < 0.1:  # the first is warmup
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        t0 = time.perf_counter()
        F.linear(a, b)[0, 0].item()  # synchronizes
        times.append(time.perf_counter() - t0)
    return 2 * n**3 / min(times[1:])
