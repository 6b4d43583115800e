"""HellaSwag by the plain formula, four full rows per example with logits at every position; and examples for it."""

import random

import torch
import torch.nn.functional as F

from gpt.hellaswag import Example
from tests.conftest import TEXT


@torch.no_grad()
def predict(model, tokenizer, example):
    """The ending with the smallest summed and with the smallest mean loss, and both sets of losses."""
    context = tokenizer.encode(example.context)
    endings = [tokenizer.encode(" " + ending) for ending in example.endings]
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


def make_examples(count, seed=0):
    """Examples with HellaSwag's lengths: the context from one place of a play, endings from anywhere in it.

    A third are as long as those from ActivityNet, the others as those from WikiHow: contexts have 250 characters on
    average and endings 130, which fits the size of hellaswag_val.jsonl, 12.2 MB for 10,042 examples.
    """
    text, rng = " ".join(TEXT.read_text().split()), random.Random(seed)

    def piece(low, high):
        at = rng.randrange(len(text) - high)
        return text[at:at + rng.randint(low, high)].strip()

    examples = []
    for i in range(count):
        context, ending = ((60, 250), (30, 120)) if i % 3 == 0 else ((150, 450), (60, 250))
        examples.append(Example(piece(*context), [piece(*ending) for _ in range(4)], rng.randrange(4)))
    return examples
