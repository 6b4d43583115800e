"""HellaSwag the usual way: the four endings of one example at a time, logits at every position."""

import torch
import torch.nn.functional as F


@torch.no_grad()
def predict(model, encoding, example):
    """The ending with the smallest summed and with the smallest mean loss, and both sets of losses."""
    context = encoding.encode_ordinary(example.context)
    endings = [encoding.encode_ordinary(" " + ending) for ending in example.endings]
    rows = [(context + ending)[-model.config.block_size - 1:] for ending in endings]
    T = max(map(len, rows)) - 1
    x = torch.tensor([row[:-1] + [0] * (T + 1 - len(row)) for row in rows])  # (4, T)
    y = torch.tensor([row[1:] + [0] * (T + 1 - len(row)) for row in rows])
    logits = model(x)  # (4, T, V)
    losses = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none").view(x.shape)
    sums, means = [], []
    for loss, row, ending in zip(losses, rows, endings, strict=True):
        scored = loss[:len(row) - 1][-len(ending):]
        sums.append(scored.sum())
        means.append(scored.mean())
    sums, means = torch.stack(sums), torch.stack(means)
    return sums.argmin().item(), means.argmin().item(), sums, means
