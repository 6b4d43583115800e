"""scripts.bench, as typed, and the formula behind MFU."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpt.config import GPTConfig
from gpt.flops import datasheet_peak, flops_per_token, measured_peak_flops
from gpt.model import GPT
from tests.conftest import assert_flag_refused, assert_refused, run

SMALL = ["--model.n_layer", "2", "--model.n_head", "2", "--model.n_embd", "32", "--seq_len", "32",
         "--micro_batch_size", "2", "--total_batch_size", "128", "--model.vocab_size", "300", "--repeats", "2",
         "--new_tokens", "4", "--shards", "1", "--device", "cpu"]


def test_flops_per_token_match_pytorchs_counter():
    """PyTorch's counter adds up the matmuls of a forward and a backward pass over all logits."""
    config = GPTConfig(block_size=256, vocab_size=5000, n_layer=3, n_head=4, n_embd=128)
    model, idx = GPT(config), torch.randint(5000, (2, 256))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # torch 2.11 counts no other on a CPU
        F.cross_entropy(model(idx).flatten(0, 1), idx.flatten()).backward()
    expected = counter.get_total_flops() / idx.numel()
    # 6 N also has position embeddings, biases and norms.
    assert flops_per_token(config, model.num_parameters(), 256) == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("what, keys", [("train", ["ms_per_step", "tokens_per_s", "mfu"]),
                                        ("generate", ["ms_per_step", "tokens_per_s", "limit_tokens_per_s"]),
                                        ("load", ["start_ms", "ms_per_batch"])])
def test_it_measures(what, keys, tmp_path):
    """For people a table; for machines JSON and nothing else on standard output. It leaves nothing behind."""
    done = run("-m", "scripts.bench", what, *SMALL, "--log_dir", tmp_path / "log", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["what"] == what and len(result["rows"]) == (4 if what == "generate" else 1)
    assert all(0 < row[key] < 1e12 for row in result["rows"] for key in keys)
    assert 50 < result["peak_memory_mb"] < 20_000
    if what == "train":
        row = result["rows"][0]
        n = GPT(GPTConfig(block_size=32, vocab_size=300, n_layer=2, n_head=2, n_embd=32)).num_parameters()
        share = (6 * n + 12 * 2 * 32 * 32) * row["tokens_per_s"] / (row["peak_tflop_per_s"] * 1e12)
        assert row["parameters"] == n and row["mfu"] == pytest.approx(share, rel=1e-3)
        done = run("-m", "scripts.bench", what, *SMALL)
        assert done.returncode == 0 and "tokens per s" in done.stdout
    assert not (tmp_path / "log").exists()


def test_measured_peak_is_possible_and_leaves_the_random_state_alone():
    """Between a pocket calculator and a supercomputer; a run that measures it must draw what it would have drawn."""
    state = torch.get_rng_state()
    assert 1e8 < measured_peak_flops(torch.device("cpu"), torch.float32) < 1e15
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("gpu, peak", [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA A100-SXM4-40GB", 312e12),
    ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12), ("NVIDIA GeForce RTX 3090", 71e12), ("Tesla T4", 65e12),
    ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA L40", None),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA GH200 480GB", None)])
def test_datasheet_peak_knows_this_chip_and_not_its_neighbours(gpu, peak):
    assert datasheet_peak(gpu) == (peak and (peak, datasheet_peak(gpu)[1]))


def test_mistakes_are_named(tmp_path):
    assert_flag_refused(run("-m", "scripts.bench", "swim"), "swim", "train")
    assert_refused(run("-m", "scripts.bench", "train", "--repeats", "0"), "repeats")
    assert_refused(run("-m", "scripts.bench", "train", "--seq_len", "auto"), "seq_len", "number")
