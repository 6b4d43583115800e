"""Parameter groups, optimizers and the learning-rate schedule."""

import math

import torch
import torch.nn as nn

from gpt.errors import UserError


def configure_optimizers(model: nn.Module, name: str, *, lr: float, weight_decay: float,
                         betas: tuple[float, float]) -> list[torch.optim.Optimizer]:
    """The optimizers for `name`: "adamw", or "muon" with AdamW for what Muon is not made for.

    AdamW (Loshchilov and Hutter 2019) decays tensors of two or more dimensions only, not biases and layer norms.
    Muon (Jordan et al. 2024) takes the matrices of the blocks; embeddings, biases and norms stay with AdamW. Its
    updates are scaled to AdamW's usual size (`match_rms_adamw`: Liu et al. 2025, "Muon is scalable for LLM
    training", section 2.2), so one learning rate serves both.

    Raises UserError for another name.
    """
    if name not in ("adamw", "muon"):
        raise UserError(f"unknown optimizer {name!r}: expected adamw or muon")
    parameters = dict(model.named_parameters())
    matrices = [p for n, p in parameters.items() if name == "muon" and n.startswith("h.") and p.dim() == 2]
    rest = [p for p in parameters.values() if not any(p is matrix for matrix in matrices)]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=lr, betas=betas, eps=1e-8, fused=True)]
    if name == "muon":
        optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def learning_rate(step: int, *, max_lr: float, min_lr_ratio: float, warmup_steps: int, max_steps: int) -> float:
    """The learning rate of the update with index `step`.

    It rises linearly to `max_lr` over `warmup_steps` updates, then falls along half a cosine to
    `max_lr * min_lr_ratio` at `max_steps` (Loshchilov and Hutter 2017, equation 5, without restarts).
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    min_lr = max_lr * min_lr_ratio
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (max_lr - min_lr)
