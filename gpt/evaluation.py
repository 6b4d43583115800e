"""The validation loss."""

import contextlib
from collections.abc import Iterable

import torch

from gpt.distributed import Distributed
from gpt.model import GPT


@torch.no_grad()
def evaluate(model: GPT, batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
             autocast: contextlib.AbstractContextManager, dist: Distributed) -> float:
    """Mean loss in nats per token over the (x, y) `batches` of all ranks, every token with the same weight.

    Call it with the uncompiled model: switching a compiled one to evaluation mode would compile it again.
    """
    was_training = model.training
    model.eval()
    losses, counts = [], []
    for x, y in batches:
        with autocast:
            losses.append(model(x, y))
        counts.append(y.numel())
    model.train(was_training)
    # Sums in float64 on the CPU; a rank with no batch at all adds nothing.
    means = torch.stack(losses).cpu().double() if losses else torch.zeros(0, dtype=torch.float64)
    tokens = torch.tensor(counts, dtype=torch.float64)
    rows = dist.all_gather(torch.stack([means @ tokens, tokens.sum()]))
    return sum(total for total, _ in rows) / sum(count for _, count in rows)
