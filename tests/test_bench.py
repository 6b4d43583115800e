"""gpt/flops.py: the FLOPs and the peak behind MFU; and benchmarks.bench as typed."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpt.config import GPTConfig
from gpt.flops import datasheet_peak, flops_per_token
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


@pytest.mark.parametrize("mode", ["train", "generate"])
def test_bench_prints_the_speed(mode):
    done = run("-m", "benchmarks.bench", mode, *TINY_BYTES, "--num_repeats", 2,
               "--max_new_tokens", 4)
    assert done.returncode == 0 and "\ntokens/s " in done.stdout, done.stderr


@pytest.mark.parametrize("gpu, expected", [
    ("H100 80GB HBM3", 989e12), ("H100 PCIe", 756e12), ("GeForce RTX 3090 Ti", None),
    ("H100 80GB HBM3 MIG 1g.10gb", None)])
def test_datasheet_peak_does_not_match_similar_names(gpu, expected):
    peak, _ = datasheet_peak(f"NVIDIA {gpu}") or (None, "")
    assert peak == expected
