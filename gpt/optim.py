"""Parameter groups, one optimizer, and the learning-rate schedule."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from gpt.device import select_precision
from gpt.errors import UserError

# Coefficients (a, b, c) of three Newton-Schulz iterations X <- aX + b(XXᵀ)X + c(XXᵀ)²X.
# Each is the minimax polynomial for the range of singular values left by the previous one
# (Amsel et al. 2025, "The Polar Express"): values from 0.01 to 1 end between 0.71 and 1.28.
# The first two allow for values 1.01 times as large: bfloat16 can round up, and beyond its
# range each polynomial grows fast.
NEWTON_SCHULZ = ((7.9401, -22.3223, 16.0788), (3.6053, -2.6452, 0.5108), (2.6684, -1.9829, 0.4533))


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Return U Vᵀ of the singular value decomposition U S Vᵀ of each matrix, approximately;
    (B, M, N), M at most N."""
    X = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for some matrices and AdamW for the other parameters,
    with one state_dict.

    The parameter groups are AdamW's, then Muon's. Muon's update is the gradient's Nesterov
    momentum, orthogonalized and scaled to the usual size of AdamW's updates (Liu et al. 2025, "Muon
    is scalable for LLM training", section 2.2), so one learning rate serves both. Matrices of the
    same shape are orthogonalized in one batch.
    """

    def __init__(self, adamw: torch.optim.AdamW, muon_params: list[nn.Parameter], lr: float,
                 weight_decay: float):
        self.adamw = adamw
        muon_group: dict[str, Any] = {"params": muon_params, "lr": lr, "weight_decay": weight_decay,
                                      "momentum": 0.95}
        super().__init__([*adamw.param_groups, muon_group], {})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> None:  # type: ignore[override]
        """Update all parameters."""
        # load_state_dict() replaces groups and state.
        *self.adamw.param_groups, muon_group = self.param_groups
        self.adamw.state = self.state
        self.adamw.step()
        self.muon_step(**muon_group)

    def muon_step(self, params: list[Any], lr: float, weight_decay: float, momentum: float) -> None:
        """Update matrices with Muon, in bfloat16 if the device computes it natively."""
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        grads = [p.grad for p in params]
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, buffers, momentum)
        torch._foreach_mul_(params, 1 - lr * weight_decay)
        is_bf16 = select_precision("auto", params[0].device) == "bf16"
        dtype = torch.bfloat16 if is_bf16 else torch.float32
        parts: list[tuple[torch.Tensor, torch.Tensor]] = []
        for p, update in zip(params, updates, strict=True):
            parts += zip(split_matrix(p), split_matrix(update), strict=True)
        for shape in dict.fromkeys(weight.shape for weight, _ in parts):
            same_shape = [pair for pair in parts if pair[0].shape == shape]
            weights, matrices = zip(*same_shape, strict=True)
            orthogonal = orthogonalize(
                torch.stack([matrix.to(dtype) for matrix in matrices])).float()
            alpha = -lr * 0.2 * math.sqrt(max(shape))
            torch._foreach_add_(weights, orthogonal.unbind(), alpha=alpha)


def split_matrix(matrix: torch.Tensor) -> list[torch.Tensor]:
    """Return views of the parts that Muon orthogonalizes separately,
    transposed if taller than wide.

    The query, key and value parts of a `c_attn.weight` (3C, C) are separate;
    any other matrix is one part.
    """
    rows, columns = matrix.shape
    return [part if len(part) <= columns else part.T
            for part in matrix.split(columns if rows == 3 * columns else rows)]


def configure_optimizer(model: nn.Module, name: str, *, lr: float, weight_decay: float,
                        betas: tuple[float, float]) -> torch.optim.Optimizer:
    """Return the optimizer `name`: "adamw", or "muon"
    (Muon for the matrices of the blocks, AdamW for the rest).

    AdamW (Loshchilov and Hutter 2019) decays tensors of two or more dimensions only,
    not biases and layer norms.

    Raises UserError if `name` is unknown.
    """
    if name not in ("adamw", "muon"):
        raise UserError(f"unknown optimizer {name!r}: expected adamw or muon")
    params = dict(model.named_parameters())
    muon_params = [p for n, p in params.items()
                   if name == "muon" and n.startswith("h.") and p.dim() == 2]
    adamw_params = [p for p in params.values() if not any(p is matrix for matrix in muon_params)]
    adamw = torch.optim.AdamW([
        {"params": [p for p in adamw_params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in adamw_params if p.dim() < 2], "weight_decay": 0.0},
    ], lr=lr, betas=betas, eps=1e-8, fused=True)
    return MuonWithAdamW(adamw, muon_params, lr, weight_decay) if muon_params else adamw


def state_shapes(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, torch.Size]]:
    """Return the shapes of the tensors that `optimizer` keeps for each parameter once it has made a
    step, by the parameter's number in its state_dict."""
    shapes: dict[int, dict[str, torch.Size]] = {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if "momentum" in group:  # Muon's
                state = {"momentum_buffer": p.shape}
            else:
                state = {"step": torch.Size([]), "exp_avg": p.shape, "exp_avg_sq": p.shape}
            shapes[len(shapes)] = state
    return shapes


def get_lr(step: int, *, max_lr: float, min_lr_ratio: float, warmup_steps: int,
           max_steps: int) -> float:
    """Return the learning rate of step number `step` (from 0).

    It rises linearly to `max_lr` over `warmup_steps` steps, then falls along half a
    cosine to `max_lr * min_lr_ratio` at `max_steps` (Loshchilov and Hutter 2017,
    equation 5, without restarts).
    """
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    min_lr = max_lr * min_lr_ratio
    decay_ratio = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return min_lr + 0.5 * (1 + math.cos(math.pi * decay_ratio)) * (max_lr - min_lr)
