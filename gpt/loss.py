"""Cross-entropy through the LM head, on a CPU without ever holding all logits."""

import torch
import torch.nn.functional as F

from gpt.linear import linear

# Columns of logits held at once on a CPU, for all rows: at 1024 rows 8 MB, which stay in cache. Of 512, 1024, 2048 and
# 4096, at C = 128 and 768, the middle two are the fastest and within noise of each other.
VOCAB_BLOCK = 2048


def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats per token, of the logits `x @ weight.T` against `targets`; a scalar.

    x: (N, C) final activations, weight: (V, C) of the LM head, targets: (N,) int64 below V.

    On a CPU in float32 the vocabulary goes through in blocks (`BlockedLinearCrossEntropy`). Elsewhere, and under
    autocast, all logits are made and PyTorch's kernels, compiled on CUDA, do the rest: not yet measured against blocks.
    """
    if x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        # Asked here: inside the function gradients are off, and its needs_input_grad ignores torch.no_grad().
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return BlockedLinearCrossEntropy.apply(x, weight, targets)
        return token_losses(x, weight, targets).mean(dtype=torch.float64).to(x.dtype)
    logits = F.linear(x, weight)  # (N, V)
    return F.cross_entropy(logits.float(), targets)


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


class BlockedLinearCrossEntropy(torch.autograd.Function):
    """Walk the vocabulary twice, first for each row's sum of exponentials, then for the gradients.

    The gradient of the mean loss with respect to the logits is (softmax(logits) - onehot(target)) / N, so a block's
    share of both gradients is two matrix products. The logits are worked out a second time: that costs less than
    writing all of them to memory and reading them again. Nothing of size (N, V) is ever kept.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
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
    def backward(ctx, grad_output):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_output, grad_weight * grad_output, None
