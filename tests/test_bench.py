"""benchmarks.bench as typed, and gpt/flops.py: the FLOPs and the peak behind MFU."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bench import BenchConfig, main
from gpt.config import GPTConfig
from gpt.errors import UserError
from gpt.flops import datasheet_peak, flops_per_token, measured_peak_flops
from gpt.model import GPT
from tests.conftest import run

SMALL = ["--model.n_layer", "2", "--model.n_head", "2", "--model.n_embd", "32",
         "--seq_len", "32", "--micro_batch_size", "2", "--total_batch_size", "128",
         "--model.vocab_size", "300", "--num_repeats", "2", "--max_new_tokens", "4",
         "--device", "cpu"]


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


def bench(mode, tmp_path):
    """Run benchmarks.bench and return the rows of its table by name: one word per column."""
    done = run("-m", "benchmarks.bench", mode, *SMALL, "--log_dir", tmp_path / "log")
    assert done.returncode == 0 and not (tmp_path / "log").exists(), done.stderr
    return {line[:20].strip(): line[20:].split() for line in done.stdout.splitlines()[1:]}


def test_bench_train_prints_consistent_numbers(tmp_path):
    table = bench("train", tmp_path)
    assert table["batch"] == ["2", "x", "2", "x", "32"]
    peak, mfu, ms, rate, memory = (float(table[name][0]) for name in (
        "peak TFLOP/s", "MFU (%)", "ms/step", "tokens/s", "peak memory (GB)"))
    config = GPTConfig(block_size=32, vocab_size=300, n_layer=2, n_head=2, n_embd=32)
    n = GPT(config).num_parameters()
    assert table["parameters"] == [f"{n:,}"] and ms == pytest.approx(1e3 * 128 / rate, abs=0.1)
    flops = 6 * n + 12 * 2 * 32 * 32
    assert mfu == pytest.approx(100 * flops * rate / (peak * 1e12), rel=0.01, abs=0.06)
    assert 0.05 < memory < 20


def test_bench_generate_limit_scales_with_batch_and_dtype(tmp_path):
    table = bench("generate", tmp_path)
    assert table["weights"] == ["float32"] * 2 + ["bfloat16"] * 2
    assert table["batch size"] == ["1", "16"] * 2
    # all weights are read for a step of the whole batch
    limits = list(map(float, table["limit (tokens/s)"]))
    assert limits[1:] == pytest.approx([16 * limits[0], 2 * limits[0], 32 * limits[0]], rel=1e-3)
    assert all(0 < float(tokens_per_s) < 1e6 for tokens_per_s in table["tokens/s"])


def test_measured_peak_flops_keeps_the_random_state():
    """The measurement must not change the random numbers of a run."""
    state = torch.get_rng_state()
    assert 1e8 < measured_peak_flops(torch.device("cpu"), torch.float32) < 1e15
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("gpu, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA A100-SXM4-40GB", 312e12), ("NVIDIA L4", 121e12), ("NVIDIA L40", None),
    ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA GH200 480GB", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None)])
def test_datasheet_peak_does_not_match_similar_names(gpu, peak):
    assert (datasheet_peak(gpu) or (None,))[0] == peak


def test_bench_rejects_zero_repeats():
    with pytest.raises(UserError, match="num_repeats is 0"):
        main(BenchConfig(num_repeats=0))
