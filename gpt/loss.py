"""Cross-entropy through the LM head without ever holding all logits."""

from typing import Any

import torch
import torch.nn.functional as F

from gpt.linear import linear

# Columns of logits held at once, for all rows: at 1024 rows 8 MB, which stay in a CPU's cache. Of 512, 1024, 2048 and
# 4096, at C = 128 and 768, the middle two are the fastest and within noise of each other.
VOCAB_BLOCK = 2048
# Rows of logits held at once where caches do not matter but memory does: of 50,257 tokens, in bfloat16 and float32,
# they take 0.3 GB.
ROW_BLOCK = 1024


def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats per token, of the logits `x @ weight.T` against `targets`; a scalar.

    x: (N, C) final activations, weight: (V, C) of the LM head, targets: (N,) int64 below V.

    With gradients, the logits go through in blocks of columns on a CPU in float32, elsewhere in blocks of rows.
    """
    # Asked here: inside the function gradients are off, and its needs_input_grad ignores torch.no_grad().
    if not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return token_losses(x, weight, targets).mean()
    in_cache = x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return (ColumnBlocks if in_cache else RowBlocks).apply(x, weight, targets)


def token_losses(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The cross-entropy (N,) of each row, in nats, float32: see `linear_cross_entropy`. Without gradients."""
    return log_sum_exp(x, weight) - (x * weight[targets]).sum(1).float()


@torch.no_grad()
def log_sum_exp(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The logarithm (N,) of the sum of the exponentials of each row of the logits `x @ weight.T`, float32."""
    log_total = torch.full((len(x),), -torch.inf, device=x.device)
    for start in range(0, len(weight), VOCAB_BLOCK):
        logits = linear(weight[start:start + VOCAB_BLOCK], x).float()  # (VOCAB_BLOCK, N)
        largest = logits.amax(0)
        log_total = torch.logaddexp(log_total, logits.sub_(largest).exp_().sum(0).log_() + largest)
    return log_total


class ColumnBlocks(torch.autograd.Function):
    """Walk the vocabulary twice, first for each row's sum of exponentials, then for the gradients.

    The gradient of the mean loss with respect to the logits is (softmax(logits) - onehot(target)) / N, so a block's
    share of both gradients is two matrix products. The logits are worked out a second time: on a CPU that costs less
    than writing all of them to memory and reading them again.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        N = len(x)
        log_total = log_sum_exp(x, weight)  # (N,)
        grad_x, grad_weight, x_over_n = torch.zeros_like(x.T), torch.empty_like(weight), x / N  # grad_x: (C, N)
        for start in range(0, len(weight), VOCAB_BLOCK):
            block = weight[start:start + VOCAB_BLOCK]
            p = linear(block, x).sub_(log_total).exp_()  # (VOCAB_BLOCK, N), so that neither product has to turn it over
            here = ((targets >= start) & (targets < start + len(block))).nonzero()[:, 0]  # rows whose target is here
            p[targets[here] - start, here] -= 1
            grad_weight[start:start + VOCAB_BLOCK] = linear(p, x_over_n.T)
            grad_x += linear(block.T, p.T)
        ctx.save_for_backward(grad_x.T.div(N), grad_weight)
        losses = log_total - (x * weight[targets]).sum(1)
        return losses.mean(dtype=torch.float64).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_output, grad_weight * grad_output, None


class RowBlocks(torch.autograd.Function):
    """The same gradients, row by row: each block has all it takes at once, and no product is worked out twice.

    The products are in autocast's dtype, all else in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        kind, V = x.device.type, len(weight)
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        # Tensor cores want rows of logits that begin at multiples of 16 bytes: here, and only here, it is padded.
        padded = F.pad(weight.to(dtype), (0, 0, 0, -V % 64))
        loss, grad_x, grad_weight = x.new_zeros(()), [], torch.zeros_like(weight)
        for x_rows, target in zip(x.to(dtype).split(ROW_BLOCK), targets[:, None].split(ROW_BLOCK), strict=True):
            logits = F.linear(x_rows, padded)  # (rows, len(padded))
            logits[:, V:] = -torch.inf
            log_p = logits.log_softmax(1, dtype=torch.float32)
            log_p_target = log_p.gather(1, target)
            loss -= log_p_target.sum()
            p = log_p.exp_().to(dtype).scatter_(1, target, log_p_target.expm1().to(dtype))  # softmax - onehot
            grad_x.append(p @ padded)
            grad_weight += (p.T @ x_rows)[:V]
        ctx.save_for_backward(torch.cat(grad_x).to(x.dtype), grad_weight)
        return loss / len(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_x, grad_weight = ctx.saved_tensors
        share = grad_output / len(grad_x)  # not in the products: 1 / N is too small for fp16
        return grad_x * share, grad_weight * share, None
