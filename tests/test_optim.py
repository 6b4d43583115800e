"""gpt/optim.py: the schedule and the optimizers against their formulas."""

import copy
import math

import pytest
import torch
import torch.nn as nn

from gpt import optim
from gpt.config import GPTConfig
from gpt.model import GPT
from gpt.optim import configure_optimizer, get_lr, orthogonalize

SCHEDULE = dict(max_lr=6e-4, min_lr_ratio=0.1, warmup_steps=100, max_steps=1000)
SETTINGS = dict(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))


def make_model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=30, n_layer=2, n_head=2, n_embd=8))


def backward(model, step):
    """Compute the gradients of the loss on random tokens."""
    idx = torch.randint(30, (4, 8), generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    model(idx, idx.roll(-1, 1)).backward()


def test_get_lr_warms_up_and_follows_half_a_cosine():
    quarter = 6e-5 + 5.4e-4 * 0.5 * (1 + math.cos(math.pi / 4))
    for step, expected in [(0, 6e-6), (49, 3e-4), (99, 6e-4), (100, 6e-4), (325, quarter),
                           (550, 3.3e-4), (1000, 6e-5), (5000, 6e-5)]:
        assert get_lr(step, **SCHEDULE) == pytest.approx(expected), step
    assert get_lr(0, **{**SCHEDULE, "warmup_steps": 0}) == pytest.approx(6e-4)
    assert get_lr(5, max_lr=1, min_lr_ratio=0, warmup_steps=5, max_steps=5) == 1


def test_adamw_follows_its_formula():
    """Three steps, with weight decay on matrices only (Loshchilov and Hutter 2019, algorithm 2)."""
    lr, decay, (b1, b2) = SETTINGS.values()
    model = make_model()
    optimizer = configure_optimizer(model, "adamw", **SETTINGS)
    w = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    m = {n: torch.zeros_like(t) for n, t in w.items()}
    v = {n: torch.zeros_like(t) for n, t in w.items()}
    for t in range(1, 4):
        backward(model, t)
        for name, p in model.named_parameters():
            g = p.grad.double()
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g * g
            w[name] *= 1 - lr * (decay if p.dim() >= 2 else 0)
            w[name] -= lr * (m[name] / (1 - b1**t)) / ((v[name] / (1 - b2**t)).sqrt() + 1e-8)
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.allclose(p.double(), w[name], rtol=1e-4, atol=1e-6), name


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = make_model()
    groups = configure_optimizer(model, "muon", **SETTINGS).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, not_decayed, muon = ([names[id(p)] for p in group["params"]] for group in groups)
    assert decayed == ["wte.weight", "wpe.weight"] and groups[1]["weight_decay"] == 0
    matrices = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert sorted(muon) == sorted(f"h.{i}.{matrix}.weight"
                                  for i in range(2) for matrix in matrices)
    assert sorted(decayed + not_decayed + muon) == sorted(names.values())


def test_muon_with_adamw_updates_like_two_separate_optimizers(monkeypatch):
    """With PyTorch's five iterations, its Muon on separate query, key and value matrices;
    state reloaded midway."""
    monkeypatch.setattr(optim, "NEWTON_SCHULZ", 5 * [(3.4445, -4.7750, 2.0315)])
    model = make_model()
    optimizer = configure_optimizer(model, "muon", **SETTINGS)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    parts = {name: [nn.Parameter(part.clone())
                    for part in (tensor.split(8) if "c_attn.weight" in name else [tensor])]
             for name, tensor in start.items()}
    in_muon = [p for name in parts for p in parts[name] if name.startswith("h.") and p.dim() == 2]
    adamw = [p for name in parts for p in parts[name] if not any(p is matrix for matrix in in_muon)]
    references = [
        torch.optim.Muon(in_muon, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([{"params": [p for p in adamw if p.dim() > 1]},
                           {"params": [p for p in adamw if p.dim() == 1], "weight_decay": 0}],
                          lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))]
    for step in range(4):
        if step == 2:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = configure_optimizer(model, "muon", **SETTINGS)
            optimizer.load_state_dict(state)
        backward(model, step)
        for name, p in model.named_parameters():
            grads = p.grad.split(8) if "c_attn.weight" in name else [p.grad]
            for part, grad in zip(parts[name], grads, strict=True):
                part.grad = grad.clone()
        for each in (optimizer, *references):
            each.step()
    for name, p in model.named_parameters():
        change, expected = p - start[name], torch.cat(parts[name]) - start[name]
        # bfloat16, and small singular values
        assert (change - expected).norm() < 0.1 * expected.norm(), name


def test_orthogonalize_keeps_singular_vectors_and_levels_their_values():
    u, v = (torch.linalg.qr(torch.randn(3, n, 16, generator=torch.Generator().manual_seed(n)))[0]
            for n in (16, 40))
    values = torch.logspace(-1.5, 0, 16)
    orthogonal = orthogonalize(5 * u * values @ v.mT)
    levelled = u.mT @ orthogonal @ v
    assert (levelled - torch.diag_embed(levelled.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4
    assert levelled.diagonal(dim1=1, dim2=2).min() > 0.72
    assert levelled.diagonal(dim1=1, dim2=2).max() < 1.28
    rank_one = (u[:, :, :1] @ v[:, :, :1].mT).bfloat16()
    assert torch.linalg.matrix_norm(orthogonalize(rank_one).float(), 2).max() < 1.3
