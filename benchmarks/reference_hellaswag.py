"""Reference implementation of HellaSwag: one full row per ending, logits at every position.
And random examples."""

import random
from pathlib import Path

import torch
import torch.nn.functional as F

from gpt.hellaswag import Example
from gpt.model import GPT
from gpt.tokenizer import Tokenizer

TEXT = Path(__file__).resolve().parents[1] / "tests" / "data" / "coriolanus.txt"


@torch.no_grad()
def score_endings(model: GPT, tokenizer: Tokenizer, examples: list[Example]) -> torch.Tensor:
    """Return the summed and the mean loss of the tokens of each ending, in nats:
    (2, examples, 4)."""
    scores = []
    for example in examples:
        context = tokenizer.encode(example.context)
        endings = [tokenizer.encode(" " + ending) for ending in example.endings]
        rows = [(context + ending)[-model.config.block_size - 1:] for ending in endings]
        T = max(map(len, rows)) - 1
        x = torch.tensor([row[:-1] + [0] * (T + 1 - len(row)) for row in rows])  # (4, T)
        y = torch.tensor([row[1:] + [0] * (T + 1 - len(row)) for row in rows])
        losses = F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="none").view(4, T)
        for row, ending, row_losses in zip(rows, endings, losses, strict=True):
            ending_losses = row_losses[:len(row) - 1][-len(ending):]
            scores.append(torch.stack([ending_losses.sum(), ending_losses.mean()]))
    return torch.stack(scores, dim=1).view(2, len(examples), 4)


def make_examples(count: int, seed: int = 0) -> list[Example]:
    """Return examples with HellaSwag's lengths; contexts and endings are random excerpts of a play.

    A third are as long as those from ActivityNet, the others as those from WikiHow: contexts have
    250 characters on average and endings 130, which matches the size of hellaswag_val.jsonl,
    12.2 MB for 10,042 examples.
    """
    text, rng = " ".join(TEXT.read_text().split()), random.Random(seed)

    def excerpt(low: int, high: int) -> str:
        start = rng.randrange(len(text) - high)
        return text[start:start + rng.randint(low, high)].strip()

    examples = []
    for i in range(count):
        context, ending = ((60, 250), (30, 120)) if i % 3 == 0 else ((150, 450), (60, 250))
        examples.append(Example(excerpt(*context), [excerpt(*ending) for _ in range(4)],
                                rng.randrange(4)))
    return examples
