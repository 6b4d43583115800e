"""gpt/loss.py against the plain formula."""

import pytest
import torch
import torch.nn.functional as F

from gpt.loss import VOCAB_BLOCK, linear_cross_entropy, token_losses


def plain(x, weight, targets):
    """Cross-entropy over all logits, in float64."""
    return F.cross_entropy(x.double() @ weight.double().T, targets)


@pytest.mark.parametrize("N, V, C", [(1, 7, 4), (30, VOCAB_BLOCK, 8), (257, VOCAB_BLOCK + 1, 16), (700, 5003, 64),
                                     (300, 50257, 32)])
@pytest.mark.parametrize("scale", [0.02, 3.0])
def test_it_is_the_plain_formula(N, V, C, scale):
    """Value and both gradients to 1e-5 relative: the chunks and the gradients made in the forward pass are exact."""
    torch.manual_seed(N + V)
    x, weight = torch.randn(N, C, requires_grad=True), (scale * torch.randn(V, C)).requires_grad_()
    targets = torch.randint(V, (N,))
    expected = plain(x, weight, targets)
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


def test_under_autocast_it_is_close():
    """bfloat16 has three digits; the loss is summed in float32."""
    torch.manual_seed(0)
    x, weight, targets = torch.randn(300, 64), 0.1 * torch.randn(1000, 64), torch.randint(1000, (300,))
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(plain(x, weight, targets).item(), rel=1e-2)
