"""gpt/optim.py: the schedule and the optimizers against their formulas."""

import math

import pytest
import torch

from gpt import optim
from gpt.config import GPTConfig
from gpt.model import GPT
from gpt.optim import configure_optimizer, get_lr, orthogonalize


def make_model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=30, n_layer=2, n_head=2, n_embd=8))


def backward(model):
    """Compute the gradients of the loss on random tokens."""
    idx = torch.randint(30, (4, 8))
    model.zero_grad()
    model(idx, idx.roll(-1, 1)).backward()


@pytest.mark.parametrize("step, expected", [
    (0, 0.02), (49, 1), (100, 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2), (999, 0.1)])
def test_learning_rate_warms_up_and_follows_half_a_cosine(step, expected):
    lr = get_lr(step, max_lr=6, min_lr_ratio=0.1, warmup_steps=50, max_steps=250)
    assert lr == pytest.approx(6 * expected)


def unit(matrices):
    """Return matrices of norm 1. In place of `orthogonalize`, whose own test is below: that one
    amplifies rounding errors."""
    return matrices / matrices.norm(dim=(-2, -1), keepdim=True)


@pytest.mark.parametrize("optimizer_name", ["adamw", "muon"])
def test_optimizer_follows_its_formula(monkeypatch, optimizer_name):
    """AdamW with weight decay on matrices only (Loshchilov and Hutter 2019, algorithm 2).
    Muon (Liu et al. 2025, section 2.2) for the matrices of the blocks, with query, key and value
    matrices one by one, and AdamW for the rest."""
    monkeypatch.setattr(optim, "orthogonalize", unit)
    monkeypatch.setattr(optim, "select_precision", lambda *_: "float32")
    model = make_model()
    optimizer = configure_optimizer(model, optimizer_name, lr=1e-2, weight_decay=0.1,
                                    betas=(0.9, 0.95))
    expected = {name: p.detach().double() for name, p in model.named_parameters()}
    m, v = dict.fromkeys(expected, 0), dict.fromkeys(expected, 0)
    for t in range(1, 4):
        backward(model)
        optimizer.step()
        for name, p in model.named_parameters():
            grad = p.grad.double()
            if optimizer_name == "muon" and name.startswith("h.") and p.dim() == 2:
                m[name] = 0.95 * m[name] + 0.05 * grad
                nesterov = 0.95 * m[name] + 0.05 * grad
                parts = nesterov.split(8 if "c_attn" in name else len(p))
                scale = 0.2 * math.sqrt(max(parts[0].shape))
                update = scale * torch.cat([unit(part) for part in parts])
            else:
                m[name] = 0.9 * m[name] + 0.1 * grad
                v[name] = 0.95 * v[name] + 0.05 * grad**2
                update = m[name] / (1 - 0.9**t) / ((v[name] / (1 - 0.95**t)).sqrt() + 1e-8)
            if p.dim() == 2:
                update += 0.1 * expected[name]
            expected[name] -= 1e-2 * update
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.double(), expected[name], rtol=1e-4, atol=1e-6)


def test_orthogonalize_keeps_singular_vectors_and_levels_their_values():
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(3, n, 16))[0] for n in (16, 40))
    values = torch.logspace(-1.5, 0, 16)
    levelled = u.mT @ orthogonalize(5 * u * values @ v.mT) @ v
    diagonal = levelled.diagonal(dim1=1, dim2=2)
    assert (levelled - torch.diag_embed(diagonal)).abs().max() < 1e-4
    assert diagonal.min() > 0.72
    assert diagonal.max() < 1.28
