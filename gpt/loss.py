"""Chunked cross-entropy through the LM head, which never holds all logits at once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

# Tokens per chunk, by device type. Every chunk reads the LM head and adds to its gradient, which a
# GPU's memory slows down, and torch.compile unrolls the chunks. With a vocabulary of 50,257, the
# logits of 1,024 tokens take 0.1 GB in bfloat16 and 0.2 GB in float32.
CHUNK_SIZE = {"cpu": 1024, "mps": 1024, "cuda": 8192}


def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor,
                         targets: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy, in nats per token, of the logits `x @ weight.T`
    against `targets`; a scalar.

    x: (N, C) hidden states, weight: (V, C) of the LM head, targets: (N,) int64 below V.
    """
    # Checked here: inside the Function gradients are always off,
    # and needs_input_grad ignores torch.no_grad().
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return ChunkedCrossEntropy.apply(x, weight, targets)
    return token_losses(x, partial(F.linear, weight=weight), targets).mean()


@torch.no_grad()
def token_losses(x: torch.Tensor, lm_head: Callable[[torch.Tensor], torch.Tensor],
                 targets: torch.Tensor) -> torch.Tensor:
    """Return each token's cross-entropy in nats, (N,) float32;
    `lm_head` maps hidden states `x` (N, C) to logits."""
    chunk_size = CHUNK_SIZE[x.device.type]
    chunks = zip(x.split(chunk_size), targets.split(chunk_size), strict=True)
    return torch.cat([F.cross_entropy(lm_head(x_chunk).float(), target, reduction="none")
                      for x_chunk, target in chunks])


class ChunkedCrossEntropy(torch.autograd.Function):
    """Compute both gradients in the forward pass, chunk by chunk,
    so that logits are neither saved nor recomputed.

    The gradient of a token's loss with respect to its logits is softmax(logits) - onehot(target).
    Matmuls run in autocast's dtype, everything else in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor,
                targets: torch.Tensor) -> torch.Tensor:
        device_type, V = x.device.type, len(weight)
        is_autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if is_autocast else x.dtype
        # Matmuls are faster, on tensor cores and on CPUs,
        # if rows of logits are aligned to 128 bytes.
        padded = F.pad(weight.to(dtype), (0, 0, 0, -V % 64))
        loss, grad_x, grad_weight = x.new_zeros(()), [], torch.zeros_like(weight)
        x_chunks = x.to(dtype).split(CHUNK_SIZE[device_type])
        target_chunks = targets[:, None].split(CHUNK_SIZE[device_type])
        for x_chunk, target in zip(x_chunks, target_chunks, strict=True):
            logits = F.linear(x_chunk, padded)  # (chunk, V rounded up to 64)
            logits[:, V:] = -torch.inf
            log_p = logits.log_softmax(1, dtype=torch.float32)
            log_p_target = log_p.gather(1, target)
            loss -= log_p_target.sum()
            grad_logits = log_p.exp_().to(dtype).scatter_(1, target, log_p_target.expm1().to(dtype))
            grad_x.append(grad_logits @ padded)
            grad_weight += (grad_logits.T @ x_chunk)[:V]
        ctx.save_for_backward(torch.cat(grad_x).to(x.dtype), grad_weight)
        return loss / len(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        grad_loss = grad_output / len(grad_x)  # divided here: probabilities / N underflow in fp16
        return grad_x * grad_loss, grad_weight * grad_loss, None
