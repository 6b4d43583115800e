"""Parameter groups, one optimizer, and the learning-rate schedule."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from gpt.errors import UserError


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon for some parameters and AdamW for the others, as one optimizer with one state_dict.

    The parameter groups are AdamW's, then Muon's. GradScaler skips both on an overflow.
    """

    def __init__(self, adamw: torch.optim.AdamW, muon: torch.optim.Muon):
        self.adamw, self.muon = adamw, muon
        super().__init__([*adamw.param_groups, *muon.param_groups], {})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        """Update all parameters."""
        n = len(self.adamw.param_groups)  # load_state_dict() replaces groups and state: point both at the current ones
        self.adamw.param_groups, self.muon.param_groups = self.param_groups[:n], self.param_groups[n:]
        self.adamw.state = self.muon.state = self.state
        self.adamw.step()
        self.muon.step()


def configure_optimizer(model: nn.Module, name: str, *, lr: float, weight_decay: float,
                        betas: tuple[float, float]) -> torch.optim.Optimizer:
    """Return the optimizer called `name`: "adamw", or "muon" with AdamW for what Muon is not made for.

    AdamW (Loshchilov and Hutter 2019) decays tensors of two or more dimensions only, not biases and layer norms.
    Muon (Jordan et al. 2024) takes the matrices of the blocks; embeddings, biases and norms stay with AdamW. Its
    updates are scaled to AdamW's usual size (`match_rms_adamw`: Liu et al. 2025, "Muon is scalable for LLM training",
    section 2.2), so one learning rate serves both.

    Raises UserError for another name.
    """
    if name not in ("adamw", "muon"):
        raise UserError(f"unknown optimizer {name!r}: expected adamw or muon")
    params = dict(model.named_parameters())
    muon_params = [p for n, p in params.items() if name == "muon" and n.startswith("h.") and p.dim() == 2]
    adamw_params = [p for p in params.values() if not any(p is matrix for matrix in muon_params)]
    adamw = torch.optim.AdamW([
        {"params": [p for p in adamw_params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in adamw_params if p.dim() < 2], "weight_decay": 0.0},
    ], lr=lr, betas=betas, eps=1e-8, fused=True)
    if name == "adamw":
        return adamw
    muon = torch.optim.Muon(muon_params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return MuonWithAdamW(adamw, muon)


def merge_state_dicts(state_dicts: list[dict]) -> dict[str, Any]:
    """Return one state_dict for those of several optimizers, as checkpoints before `MuonWithAdamW` hold them."""
    merged: dict[str, Any] = {"state": {}, "param_groups": []}
    for state_dict in state_dicts:
        offset = sum(len(group["params"]) for group in merged["param_groups"])  # parameters are counted over all groups
        merged["state"] |= {offset + i: state for i, state in state_dict["state"].items()}
        merged["param_groups"] += [group | {"params": [offset + i for i in group["params"]]}
                                   for group in state_dict["param_groups"]]
    return merged


def get_lr(step: int, *, max_lr: float, min_lr_ratio: float, warmup_steps: int, max_steps: int) -> float:
    """Return the learning rate of the update with index `step`.

    It rises linearly to `max_lr` over `warmup_steps` updates, then falls along half a cosine to
    `max_lr * min_lr_ratio` at `max_steps` (Loshchilov and Hutter 2017, equation 5, without restarts).
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    min_lr = max_lr * min_lr_ratio
    decay_ratio = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_lr + 0.5 * (1 + math.cos(math.pi * decay_ratio)) * (max_lr - min_lr)
