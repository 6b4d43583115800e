"""scripts.bench, as typed, and the formula behind MFU."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gpt import linear
from gpt.config import GPTConfig
from gpt.flops import flops_per_token, matmul_rate
from gpt.model import GPT
from tests.conftest import assert_refused, run

SMALL = ["--model.n_layer", "2", "--model.n_head", "2", "--model.n_embd", "32", "--seq_len", "32",
         "--micro_batch_size", "2", "--total_batch_size", "128", "--model.vocab_size", "300", "--repeats", "2",
         "--new_tokens", "4", "--shards", "1", "--device", "cpu"]


def test_flops_are_those_that_pytorch_counts(monkeypatch):
    """PyTorch's own counter adds up the matrix products of a forward and a backward pass over all logits. It does not
    know oneDNN's."""
    monkeypatch.setattr(linear, "HAS_ONEDNN", False)
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
        share = (6 * n + 12 * 2 * 32 * 32) * row["tokens_per_s"] / (row["matmul_tflop_per_s"] * 1e12)
        assert row["parameters"] == n and row["mfu"] == pytest.approx(share, rel=1e-3)
        done = run("-m", "scripts.bench", what, *SMALL)
        assert done.returncode == 0 and "tokens per s" in done.stdout
    assert not (tmp_path / "log").exists()


def test_the_matmul_rate_is_possible_and_leaves_random_numbers_alone():
    """Between a pocket calculator and a supercomputer; a run that measures it must draw what it would have drawn."""
    state = torch.get_rng_state()
    assert 1e8 < matmul_rate(torch.device("cpu"), torch.float32) < 1e15
    assert torch.equal(torch.get_rng_state(), state)


def test_mistakes_are_named(tmp_path):
    assert_refused(run("-m", "scripts.bench", "swim"), "swim", "train")
    assert_refused(run("-m", "scripts.bench", "train", "--repeats", "0"), "repeats")
    assert_refused(run("-m", "scripts.bench", "train", "--seq_len", "auto"), "seq_len", "number")
