"""gpt/optim.py: the schedule and the optimizers against their formulas."""

import copy
import math

import pytest
import torch

from gpt.config import GPTConfig
from gpt.model import GPT
from gpt.optim import configure_optimizer, get_lr, merge_state_dicts

SCHEDULE = dict(max_lr=6e-4, min_lr_ratio=0.1, warmup_steps=100, max_steps=1000)


def model():
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=8, vocab_size=30, n_layer=2, n_head=2, n_embd=8))


def test_schedule():
    """Warmup from max_lr / warmup_steps, the peak, the middle and the end of the cosine."""
    assert get_lr(0, **SCHEDULE) == pytest.approx(6e-6)
    assert get_lr(49, **SCHEDULE) == pytest.approx(3e-4)
    assert get_lr(99, **SCHEDULE) == pytest.approx(6e-4)
    assert get_lr(100, **SCHEDULE) == pytest.approx(6e-4)
    assert get_lr(550, **SCHEDULE) == pytest.approx((6e-4 + 6e-5) / 2)
    assert get_lr(325, **SCHEDULE) == pytest.approx(6e-5 + 5.4e-4 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert get_lr(1000, **SCHEDULE) == get_lr(5000, **SCHEDULE) == pytest.approx(6e-5)
    assert get_lr(0, **{**SCHEDULE, "warmup_steps": 0}) == pytest.approx(6e-4)
    assert get_lr(5, max_lr=1, min_lr_ratio=0, warmup_steps=5, max_steps=5) == 1


def test_adamw_follows_its_formula():
    """Three updates by hand, decay on matrices only (Loshchilov and Hutter 2019, algorithm 2)."""
    lr, decay, (b1, b2) = 1e-2, 0.1, (0.9, 0.95)
    net = model()
    optimizer = configure_optimizer(net, "adamw", lr=lr, weight_decay=decay, betas=(b1, b2))
    w = {name: p.detach().double().clone() for name, p in net.named_parameters()}
    m, v = {n: torch.zeros_like(t) for n, t in w.items()}, {n: torch.zeros_like(t) for n, t in w.items()}
    for t in range(1, 4):
        idx = torch.randint(30, (4, 8))
        net(idx, idx.roll(-1, 1)).backward()
        for name, p in net.named_parameters():
            g = p.grad.double()
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g * g
            w[name] *= 1 - lr * (decay if p.dim() >= 2 else 0)
            w[name] -= lr * (m[name] / (1 - b1**t)) / ((v[name] / (1 - b2**t)).sqrt() + 1e-8)
        optimizer.step()
        optimizer.zero_grad()
    for name, p in net.named_parameters():
        assert torch.allclose(p.double(), w[name], rtol=1e-4, atol=1e-6), name


def test_every_parameter_has_one_optimizer():
    """Muon takes the matrices of the blocks, AdamW all others; none is left out and none is taken twice."""
    net = model()
    optimizer = configure_optimizer(net, "muon", lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    adamw, muon = optimizer.adamw, optimizer.muon
    names = {id(p): name for name, p in net.named_parameters()}
    taken = [[names[id(p)] for group in o.param_groups for p in group["params"]] for o in (adamw, muon)]
    assert sorted(taken[0] + taken[1]) == sorted(names.values())
    assert sorted(taken[1]) == sorted(f"h.{i}.{matrix}.weight" for i in range(2)
                                      for matrix in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
    decayed = [names[id(p)] for group in adamw.param_groups if group["weight_decay"] for p in group["params"]]
    assert decayed == ["wte.weight", "wpe.weight"]


def test_one_optimizer_updates_as_two_would():
    """Muon with AdamW, bit for bit, also after its state was loaded; and the state has an entry per parameter."""
    nets = [model(), model()]
    settings = dict(lr=1e-2, weight_decay=0.1, betas=(0.9, 0.95))
    one, parts = configure_optimizer(nets[0], "muon", **settings), configure_optimizer(nets[1], "muon", **settings)
    for step in range(4):
        if step == 2:
            state = copy.deepcopy(one.state_dict())
            assert len(state["state"]) == len(list(nets[0].parameters()))
            one = configure_optimizer(nets[0], "muon", **settings)
            one.load_state_dict(state)
        idx = torch.randint(30, (4, 8), generator=torch.Generator().manual_seed(step))
        for net, optimizers in zip(nets, ([one], [parts.adamw, parts.muon]), strict=True):
            net(idx, idx.roll(-1, 1)).backward()
            for optimizer in optimizers:
                optimizer.step()
            net.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    merged = merge_state_dicts([parts.adamw.state_dict(), parts.muon.state_dict()])  # as older checkpoints have it
    assert merged["param_groups"] == one.state_dict()["param_groups"]
    for key, state in one.state_dict()["state"].items():
        assert all(torch.equal(value, merged["state"][key][name]) for name, value in state.items())
