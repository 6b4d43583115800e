"""benchmarks.bench as typed, and gpt/flops.py: the FLOPs and the peak behind MFU."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpt.config import GPTConfig
from gpt.flops import datasheet_peak, flops_per_token, measured_peak_flops
from gpt.model import GPT
from tests.conftest import TINY_BYTES, run


def test_flops_per_token_match_pytorchs_counter():
    """PyTorch's counter adds up the matmuls of a forward and a backward pass over all logits."""
    config = GPTConfig(block_size=256, vocab_size=5000, n_layer=3, n_head=4, n_embd=128)
    model, idx = GPT(config), torch.randint(5000, (2, 256))
    with (FlopCounterMode(display=False) as counter,
          sdpa_kernel(SDPBackend.MATH)):  # torch 2.11 counts no other on CPUs
        F.cross_entropy(model(idx).flatten(0, 1), idx.flatten()).backward()
    expected = counter.get_total_flops() / idx.numel()
    # 6 N also counts position embeddings, biases and norms.
    assert flops_per_token(config, model.num_parameters(), 256) == pytest.approx(expected, rel=0.04)


def bench(mode):
    """Run benchmarks.bench and return the rows of its table by name: one number per column."""
    done = run("-m", "benchmarks.bench", mode, *TINY_BYTES, "--num_repeats", 2,
               "--max_new_tokens", 4)
    assert done.returncode == 0, done.stderr
    rows = {line[:20].strip(): line[20:].split() for line in done.stdout.splitlines()[1:]}
    return {name: [float(word) for word in row] for name, row in rows.items()
            if name in ("peak TFLOP/s", "MFU (%)", "tokens/s", "limit (tokens/s)")}


def test_bench_train_prints_mfu():
    table = bench("train")
    config = GPTConfig(block_size=32, vocab_size=256, n_layer=2, n_head=2, n_embd=16)
    flops = flops_per_token(config, GPT(config).num_parameters(), seq_len=32)
    peak, rate = table["peak TFLOP/s"][0] * 1e12, table["tokens/s"][0]
    # On a busy machine the printed peak has one or two digits.
    assert table["MFU (%)"] == pytest.approx([100 * flops * rate / peak], rel=0.1, abs=0.06)


def test_bench_generate_limit_scales_with_batch_and_dtype():
    """All weights are read for a step of the whole batch."""
    limits = bench("generate")["limit (tokens/s)"]
    assert limits[1:] == pytest.approx([16 * limits[0], 2 * limits[0], 32 * limits[0]], rel=1e-3)


def test_measured_peak_flops_keeps_the_random_state():
    """The measurement must not change the random numbers of a run."""
    state = torch.get_rng_state()
    assert measured_peak_flops(torch.device("cpu"), torch.float32) > 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("gpu, expected", [
    ("H100 80GB HBM3", 989e12), ("H100 PCIe", 756e12), ("L4", 121e12)])
def test_datasheet_peak_of_known_gpus(gpu, expected):
    peak, _ = datasheet_peak(f"NVIDIA {gpu}")
    assert peak == expected


@pytest.mark.parametrize("gpu", ["L40", "GeForce RTX 3090 Ti", "H100 80GB HBM3 MIG 1g.10gb"])
def test_datasheet_peak_does_not_match_similar_names(gpu):
    assert datasheet_peak(f"NVIDIA {gpu}") is None
