"""gpt/linear.py against F.linear in float64."""

import pytest
import torch
import torch.nn.functional as F

from gpt import linear as module
from gpt.linear import Linear, linear


@pytest.mark.parametrize("shape, out", [((1, 8), 3), ((2, 5, 64), 48), ((700, 96), 130), ((4, 1, 16), 1)])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_onednn", [True, False])
def test_products_and_gradients_are_those_of_the_formula(monkeypatch, shape, out, has_bias, has_onednn):
    """With oneDNN, where there is one, and without: to 1e-5, the result and all gradients."""
    monkeypatch.setattr(module, "HAS_ONEDNN", has_onednn and module.HAS_ONEDNN)
    torch.manual_seed(0)
    x, weight = torch.randn(shape, requires_grad=True), torch.randn(out, shape[-1], requires_grad=True)
    bias = torch.randn(out, requires_grad=True) if has_bias else None
    inputs = [tensor for tensor in (x, weight, bias) if tensor is not None]
    expected = F.linear(*(tensor.double() for tensor in inputs))
    towards = torch.randn_like(expected)
    found = linear(x, weight, bias)
    assert torch.allclose(found.double(), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert torch.allclose(linear(x, weight, bias).double(), expected, atol=1e-5, rtol=1e-5)
    theirs = torch.autograd.grad(expected, inputs, towards)
    for mine, want in zip(torch.autograd.grad(found, inputs, towards.float()), theirs, strict=True):
        assert mine.shape == want.shape and (mine - want).norm() <= 1e-5 * want.norm()


def test_tensors_that_are_not_contiguous():
    """The gradient of a transposed view, as attention has it, and a slice of a weight."""
    torch.manual_seed(0)
    x, weight = torch.randn(6, 5, 7).transpose(0, 1), torch.randn(9, 7)[2:6]
    assert torch.allclose(linear(x, weight), F.linear(x, weight), atol=1e-5)
    x, weight = torch.randn(7, 6).T, torch.randn(7, 4).T
    assert torch.allclose(linear(x, weight), F.linear(x, weight), atol=1e-5)


def test_what_is_not_float32_on_a_cpu_is_left_to_pytorch():
    """bfloat16 weights, and autocast: the same type comes out as from nn.Linear."""
    layer = Linear(8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 8)).dtype == torch.bfloat16
    assert layer.to(torch.bfloat16)(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.double()(torch.randn(0, 8, dtype=torch.float64)).shape == (0, 4)
    assert linear(torch.randn(0, 8), torch.randn(4, 8)).shape == (0, 4)
