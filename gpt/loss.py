"""Cross-entropy through the LM head, on a CPU without ever holding all logits."""

import torch
import torch.nn.functional as F

# Rows of logits held at once on a CPU: 256 x 50,257 float32 are 51 MB. Of 64 to 512 rows, measured at C = 128, 256 and
# 768 on two cores, 256 and 512 are the fastest and within noise of each other.
CHUNK_ROWS = 256
# Columns of logits held at once where no gradients are needed. Of 1024, 2048 and 4096, at 128 to 2048 rows and C = 128
# and 768, the first two are the fastest and alike; rows in chunks of 256 take 1.05 to 4 times as long.
VOCAB_BLOCK = 2048


def linear_cross_entropy(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats per token, of the logits `x @ weight.T` against `targets`; a scalar.

    x: (N, C) final activations, weight: (V, C) of the LM head, targets: (N,) int64 below V.

    On a CPU in float32 the rows go through in chunks (`ChunkedLinearCrossEntropy`). Elsewhere, and under autocast,
    all logits are made and PyTorch's kernels, compiled on CUDA, do the rest: not yet measured against the chunks.
    """
    if x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        # Asked here: inside the function gradients are off, and its needs_input_grad ignores torch.no_grad().
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return ChunkedLinearCrossEntropy.apply(x, weight, targets)
        return token_losses(x, weight, targets).mean(dtype=torch.float64).to(x.dtype)
    logits = F.linear(x, weight)  # (N, V)
    return F.cross_entropy(logits.float(), targets)


@torch.no_grad()
def token_losses(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The cross-entropy (N,) of each row, in nats, float32: see `linear_cross_entropy`. Without gradients.

    Walks the vocabulary in blocks, whose logits stay in cache, and adds up their exponentials.
    """
    log_total = torch.full((len(x), 1), -torch.inf, device=x.device)
    for start in range(0, len(weight), VOCAB_BLOCK):
        logits = F.linear(x, weight[start:start + VOCAB_BLOCK]).float()  # (N, VOCAB_BLOCK)
        largest = logits.amax(1, keepdim=True)
        log_total = torch.logaddexp(log_total, logits.sub_(largest).exp_().sum(1, keepdim=True).log_() + largest)
    return log_total[:, 0] - (x * weight[targets]).sum(1).float()


class ChunkedLinearCrossEntropy(torch.autograd.Function):
    """Walk the rows in chunks and work out the gradients in the forward pass, while a chunk's logits are in cache.

    The gradient of the mean loss with respect to the logits is (softmax(logits) - onehot(target)) / N, so a chunk's
    share of both gradients is two matrix products, and nothing of size (N, V) is ever kept.
    """

    @staticmethod
    def forward(ctx, x, weight, targets):
        N, V = x.shape[0], weight.shape[0]
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        buffer = x.new_empty(min(CHUNK_ROWS, N), V)
        loss = x.new_zeros((), dtype=torch.float64)
        for start in range(0, N, CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            target = targets[rows, None]  # (n, 1)
            logits = torch.mm(x[rows], weight.T, out=buffer[:len(target)])  # (n, V)
            at_target = logits.gather(1, target)
            largest = logits.amax(1, keepdim=True)
            p = logits.sub_(largest).exp_()
            total = p.sum(1, keepdim=True)
            loss += (total.log() + largest - at_target).sum(dtype=torch.float64)
            p /= total * N
            p.scatter_add_(1, target, p.new_full((len(target), 1), -1 / N))
            torch.mm(p, weight, out=grad_x[rows])
            grad_weight.addmm_(p.T, x[rows])
        ctx.save_for_backward(grad_x, grad_weight)
        return (loss / N).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad_output, grad_weight * grad_output, None
