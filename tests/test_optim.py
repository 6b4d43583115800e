"""gpt/optim.py: the schedule and the optimizers against their formulas."""

import copy
import math

import pytest
import torch

from gpt.config import GPTConfig
from gpt.model import GPT
from gpt.optim import configure_optimizer, get_lr

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
    for step, expected in [(0, 6e-6), (49, 3e-4), (99, 6e-4), (100, 6e-4), (325, quarter), (550, 3.3e-4), (1000, 6e-5),
                           (5000, 6e-5)]:
        assert get_lr(step, **SCHEDULE) == pytest.approx(expected), step
    assert get_lr(0, **{**SCHEDULE, "warmup_steps": 0}) == pytest.approx(6e-4)
    assert get_lr(5, max_lr=1, min_lr_ratio=0, warmup_steps=5, max_steps=5) == 1


def test_adamw_follows_its_formula():
    """Three updates, with decay of matrices only (Loshchilov and Hutter 2019, algorithm 2)."""
    lr, decay, (b1, b2) = SETTINGS.values()
    model = make_model()
    optimizer = configure_optimizer(model, "adamw", **SETTINGS)
    w = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    m, v = {n: torch.zeros_like(t) for n, t in w.items()}, {n: torch.zeros_like(t) for n, t in w.items()}
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


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = make_model()
    optimizer = configure_optimizer(model, "muon", **SETTINGS)
    names = {id(p): name for name, p in model.named_parameters()}
    adamw, muon = ([names[id(p)] for group in part.param_groups for p in group["params"]]
                   for part in (optimizer.adamw, optimizer.muon))
    assert sorted(adamw + muon) == sorted(names.values())
    assert sorted(muon) == sorted(f"h.{i}.{matrix}.weight" for i in range(2)
                                  for matrix in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
    decayed = [names[id(p)] for group in optimizer.adamw.param_groups if group["weight_decay"] for p in group["params"]]
    assert decayed == ["wte.weight", "wpe.weight"]


def test_muon_with_adamw_updates_as_two_optimizers_would():
    """Bit for bit, also after its state was loaded."""
    one_model, two_model = make_model(), make_model()
    one, two = (configure_optimizer(model, "muon", **SETTINGS) for model in (one_model, two_model))
    for step in range(4):
        if step == 2:
            state = copy.deepcopy(one.state_dict())
            one = configure_optimizer(one_model, "muon", **SETTINGS)
            one.load_state_dict(state)
        backward(one_model, step)
        backward(two_model, step)
        one.step()
        two.adamw.step()
        two.muon.step()
    assert all(torch.equal(a, b) for a, b in zip(one_model.parameters(), two_model.parameters(), strict=True))
