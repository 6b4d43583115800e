"""gpt/loss.py against the plain formula."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt.config import GPTConfig
from gpt.loss import TOKEN_CHUNK, linear_cross_entropy, token_losses
from gpt.model import GPT
from gpt.optim import configure_optimizer


def reference(x, weight, targets):
    """Cross-entropy over all logits, in float64."""
    return F.cross_entropy(x.double() @ weight.double().T, targets)


@pytest.mark.parametrize("N, V, C", [(1, 7, 4), (30, 2048, 8), (257, 2049, 16), (700, 5003, 64), (300, 50257, 32),
                                     (TOKEN_CHUNK, 64, 8), (2 * TOKEN_CHUNK + 1, 70, 8)])
@pytest.mark.parametrize("scale", [0.02, 3.0])
def test_loss_and_gradients_match_full_logits(N, V, C, scale):
    """To 1e-5 relative: chunking and computing gradients in the forward pass are exact."""
    torch.manual_seed(N + V)
    x, weight = torch.randn(N, C, requires_grad=True), (scale * torch.randn(V, C)).requires_grad_()
    targets = torch.randint(V, (N,))
    expected = reference(x, weight, targets)
    expected_grads = torch.autograd.grad(3 * expected, (x, weight))
    loss = linear_cross_entropy(x, weight, targets)
    grads = torch.autograd.grad(3 * loss, (x, weight))  # 3: gradients must pass through, not assume 1
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for grad, want in zip(grads, expected_grads, strict=True):
        assert (grad - want).norm() <= 1e-5 * want.norm()
    with torch.no_grad():
        assert linear_cross_entropy(x, weight, targets).item() == pytest.approx(expected.item(), rel=1e-5)
        each = F.cross_entropy(x.double() @ weight.double().T, targets, reduction="none")
        assert torch.allclose(token_losses(x, weight, targets).double(), each, rtol=1e-5, atol=1e-5)


def test_large_logits_do_not_overflow():
    """A model that is very sure, right or wrong, has a finite loss."""
    x, weight = torch.full((2, 1), 1.0), torch.tensor([[0.0], [300.0], [-300.0]])
    assert linear_cross_entropy(x, weight, torch.tensor([1, 1])).item() == pytest.approx(0, abs=1e-6)
    assert linear_cross_entropy(x, weight, torch.tensor([2, 2])).item() == pytest.approx(600, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_under_autocast_errs_no_more_than_full_logits(dtype):
    """Products with three digits, sums in float32; gradients of a mean over many tokens do not vanish in fp16."""
    torch.manual_seed(0)
    x, weight = torch.randn(3000, 64, requires_grad=True), (0.3 * torch.randn(1003, 64)).requires_grad_()
    targets = torch.randint(1003, (3000,))
    expected = reference(x, weight, targets)
    expected_grads = torch.autograd.grad(expected, (x, weight))
    with torch.autocast("cpu", dtype):
        losses = linear_cross_entropy(x, weight, targets), F.cross_entropy(F.linear(x, weight).float(), targets)
        with torch.no_grad():
            assert linear_cross_entropy(x, weight, targets).item() == pytest.approx(expected.item(), rel=1e-3)
    errors = []
    for loss in losses:
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
        grads = torch.autograd.grad(loss, (x, weight))
        errors.append([((grad - want).norm() / want.norm()).item()
                       for grad, want in zip(grads, expected_grads, strict=True)])
    assert all(ours < 1.1 * reference_error for ours, reference_error in zip(*errors, strict=True)), errors


def test_half_the_memory_of_full_logits(monkeypatch):
    """A training step of GPT-2 124M in bf16, 16 x 1,024 tokens, counted tensor by tensor without making one.

    Counted with fake CPU tensors and, as on a GPU, with fused attention in bf16.
    """
    peaks = []
    monkeypatch.setattr("gpt.model.attention", lambda q, k, v, mask, dropout_p: F.scaled_dot_product_attention(
        q, k, v, mask, dropout_p, is_causal=True))
    for loss in (linear_cross_entropy, lambda x, weight, y: F.cross_entropy(F.linear(x, weight).float(), y)):
        monkeypatch.setattr("gpt.model.linear_cross_entropy", loss)
        with FakeTensorMode(), LiveMemory() as memory:
            model = GPT(GPTConfig())
            optimizer = configure_optimizer(model, "adamw", lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
            for _ in range(2):  # the optimizer's state comes with the first step
                tokens = torch.zeros(16, 1024, dtype=torch.int64)
                with torch.autocast("cpu", torch.bfloat16):
                    model(tokens, tokens).backward()
                optimizer.step()
                optimizer.zero_grad()
        peaks.append(memory.peak / 1e9)
    print(f"peak memory {peaks[0]:.2f} GB, with full logits {peaks[1]:.2f} GB")
    assert peaks[0] < 0.5 * peaks[1], peaks


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.seen = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and (storage := leaf.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                weakref.finalize(storage, self.count, -storage.nbytes())
                self.count(storage.nbytes())
        return result

    def count(self, nbytes: int) -> None:
        self.alive += nbytes
        self.peak = max(self.peak, self.alive)
