"""gpt/loss.py against cross-entropy over all logits."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from gpt.config import GPTConfig
from gpt.loss import CHUNK_SIZE, linear_cross_entropy, token_losses
from gpt.model import GPT
from gpt.optim import configure_optimizer


def make_inputs(N, V, C):
    """Return random hidden states, LM head and targets, and the reference:
    loss and gradients in float64."""
    torch.manual_seed(N + V)
    x, weight = torch.randn(N, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    targets = torch.randint(V, (N,))
    expected = F.cross_entropy(x.double() @ weight.double().T, targets)
    return x, weight, targets, expected, torch.autograd.grad(expected, (x, weight))


def relative_errors(loss, inputs, expected_grads):
    grads = torch.autograd.grad(loss, inputs)
    return [((grad - expected).norm() / expected.norm()).item()
            for grad, expected in zip(grads, expected_grads, strict=True)]


@pytest.mark.parametrize("N, V, C", [(1, 7, 4), (300, 5003, 32), (CHUNK_SIZE["cpu"], 64, 8),
                                     (2 * CHUNK_SIZE["cpu"] + 1, 70, 8)])
def test_loss_and_gradients_equal_those_of_full_logits(N, V, C):
    """Chunks, and gradients computed in the forward pass, are exact."""
    x, weight, targets, expected, expected_grads = make_inputs(N, V, C)
    loss = linear_cross_entropy(x, weight, targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    # 3: the incoming gradient is used, not assumed to be 1
    errors = relative_errors(3 * loss, (x, weight), [3 * grad for grad in expected_grads])
    assert max(errors) <= 1e-5
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, targets)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        each = F.cross_entropy(x @ weight.T, targets, reduction="none")
        losses = token_losses(x, partial(F.linear, weight=weight), targets)
        assert torch.allclose(losses, each, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow():
    """Very confident predictions, right or wrong, have a finite loss."""
    x = torch.full((2, 1), 1.0)
    weight = torch.tensor([[0.0], [300.0], [-300.0]], requires_grad=True)
    right = linear_cross_entropy(x, weight, torch.tensor([1, 1]))
    assert right.item() == pytest.approx(0, abs=1e-6)
    wrong = linear_cross_entropy(x, weight, torch.tensor([2, 2]))
    assert wrong.item() == pytest.approx(600, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_under_autocast_errs_no_more_than_full_logits(dtype):
    """Gradients of a mean over many tokens do not vanish in fp16."""
    x, weight, targets, expected, expected_grads = make_inputs(2 * CHUNK_SIZE["cpu"] + 1, 503, 32)
    with torch.autocast("cpu", dtype):
        losses = (linear_cross_entropy(x, weight, targets),
                  F.cross_entropy(F.linear(x, weight).float(), targets))
    assert losses[0].dtype == torch.float32
    assert losses[0].item() == pytest.approx(expected.item(), rel=1e-3)
    errors, reference_errors = (relative_errors(loss, (x, weight), expected_grads)
                                for loss in losses)
    assert all(error < 1.1 * most for error, most in zip(errors, reference_errors, strict=True))


def test_training_step_needs_half_the_memory_of_full_logits(monkeypatch):
    """GPT-2 124M in bf16, 16 x 1,024 tokens, on fake tensors,
    with the fused attention in bf16 that a GPU has."""
    monkeypatch.setattr("gpt.model.attention", lambda q, k, v, mask, dropout_p:
                        F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal=True))
    peaks = []
    for loss in (linear_cross_entropy,
                 lambda x, weight, y: F.cross_entropy(F.linear(x, weight).float(), y)):
        monkeypatch.setattr("gpt.model.linear_cross_entropy", loss)
        with FakeTensorMode():
            model, tokens = GPT(GPTConfig()), torch.zeros(16, 1024, dtype=torch.int64)
            optimizer = configure_optimizer(model, "adamw", lr=1e-3, weight_decay=0.1,
                                            betas=(0.9, 0.95))
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()  # creates AdamW's state, which every later step has
            optimizer.zero_grad()
            memory = MemTracker()
            memory.track_external(model, optimizer)
            with memory:
                with torch.autocast("cpu", torch.bfloat16):
                    model(tokens, tokens).backward()
                optimizer.step()
        peaks.append(memory.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] / 1e9)
    print(f"peak memory {peaks[0]:.2f} GB, with full logits {peaks[1]:.2f} GB")
    assert peaks[0] < 0.5 * peaks[1]
