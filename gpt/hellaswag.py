"""HellaSwag (Zellers et al. 2019): which of four endings continues a text?

Completion style: each ending is appended to the context after a space, and the model chooses the one with the smallest
negative log-likelihood, summed over its tokens (`acc`) or as their mean (`acc_norm`). lm-evaluation-harness's task of
this name has the topic before the context, other spaces, and means over bytes, so its numbers are others.
Over the 10,042 examples of the validation split GPT-2 124M reaches acc 0.2859 and acc_norm 0.2955, GPT-2 XL 0.3842 and
0.4893; guessing gives 0.25.

The plain way runs context and ending through the model for each ending, with logits at every position. Here a row
holds the context once and the four endings after it; each ending has the positions it would have alone, and a mask lets
it see the context and itself only. Rows of similar length share a batch, and only what predicts an ending's token goes
through the LM head.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from gpt.config import GPTConfig
from gpt.distributed import Distributed
from gpt.errors import UserError
from gpt.loss import token_losses
from gpt.model import GPT
from gpt.tokenizer import Tokenizer

BATCH_TOKENS = {"cpu": 1024, "cuda": 32768}  # positions in a batch, padding included


class Interrupted(Exception):
    """A signal has asked the run to stop."""


@dataclass
class Example:
    """A context, its possible endings, and which of them is right, counted from 0."""

    context: str
    endings: list[str]
    label: int


@dataclass
class Row:
    """The tokens of a context and of one or more endings of the example with index `example`."""

    example: int
    context: list[int]
    endings: list[list[int]]

    @property
    def length(self) -> int:
        """Positions in the model: nothing follows an ending's last token, so it is only predicted."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


def load_examples(data: str | None = None, limit: int = 0) -> list[Example]:
    """The first `limit` examples (0: all) of a file in the original format, a JSON object a line, or, without one, of
    the validation split of Rowan/hellaswag on the Hugging Face hub.

    Raises UserError for a file that is missing or has a line that is no example, and where the hub cannot be reached.
    """
    if data is None:
        import datasets  # seconds

        try:
            records = datasets.load_dataset("Rowan/hellaswag", split="validation")
        except Exception as error:  # of the network, the hub or the disk
            reason = str(error).strip().split("\n")[0][:200]
            raise UserError(f"HellaSwag cannot be had from the Hugging Face hub ({reason}): pass its file "
                            f"hellaswag_val.jsonl, with --data (in training --hellaswag_data)") from None
    else:
        try:
            records = [line for line in Path(data).read_text("utf-8-sig").split("\n") if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"HellaSwag data {data!r} cannot be read ({error}): expected a .jsonl file") from None
    examples = []
    for number, record in enumerate(records, start=1):
        if limit and number > limit:
            break
        try:
            record = json.loads(record) if isinstance(record, str) else record
            example = Example(record["ctx"], list(record["endings"]), int(record["label"]))
            texts = [example.context, *example.endings]
            if len(texts) < 3 or not all(isinstance(text, str) and text for text in texts):
                raise ValueError("an empty text, or fewer than two endings")
            if not 0 <= example.label < len(example.endings):
                raise ValueError(f"label {example.label} is none of the endings")
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise UserError(f"example {number} of {data or 'Rowan/hellaswag'} is not one of HellaSwag ({error!r}): "
                            f"expected a context `ctx`, `endings` and the `label` of the right one") from None
        examples.append(example)
    if not examples:
        raise UserError(f"HellaSwag data {data!r} has no examples")
    return examples


def make_rows(index: int, example: Example, tokenizer: Tokenizer, config: GPTConfig) -> list[Row]:
    """An example as one row, or as one for each ending if some would not fit into the model's context: then the
    beginning of the text is left out, as far as that ending needs it. Raises UserError for tokens it does not know."""
    block_size = config.block_size
    context = tokenizer.encode(example.context)
    endings = [tokenizer.encode(" " + ending) for ending in example.endings]
    if (largest := max(map(max, [context, *endings]))) >= config.vocab_size:
        raise UserError(f"HellaSwag's text has token {largest}: the model knows {config.vocab_size} tokens")
    if all(len(context) + len(ending) - 1 <= block_size for ending in endings):
        return [Row(index, context, endings)]
    rows = []
    for ending in endings:
        tokens = (context + ending)[-block_size - 1:]
        scored = min(len(ending), len(tokens) - 1)
        rows.append(Row(index, tokens[:-scored], [tokens[-scored:]]))
    return rows


def token_nlls(model: GPT, rows: list[Row]) -> list[torch.Tensor]:
    """The negative log-likelihood, in nats, of each token of each ending: a 1-D tensor for each, by row and ending.

    rows: a batch, padded here to the longest.
    """
    B, T = len(rows), max(row.length for row in rows)
    idx, positions, part = (torch.zeros(B, T, dtype=torch.int64) for _ in range(3))  # part 0: context, 1 …: endings
    sources, targets = [], []  # where in (B * T) a token is predicted, and which
    for b, row in enumerate(rows):
        start = len(row.context)
        idx[b, :start], positions[b, :start] = torch.tensor(row.context), torch.arange(start)
        for j, ending in enumerate(row.endings, start=1):
            stop = start + len(ending) - 1
            idx[b, start:stop] = torch.tensor(ending[:-1])
            positions[b, start:stop] = len(row.context) + torch.arange(stop - start)
            part[b, start:stop] = j
            sources += [b * T + len(row.context) - 1, *range(b * T + start, b * T + stop)]
            targets += ending
            start = stop
    device = model.wte.weight.device
    part = part.to(device)
    causal = torch.ones(T, T, dtype=torch.bool, device=device).tril()
    mask = causal & ((part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None]))  # (B, T, T): query, key
    x = model.hidden_states(idx.to(device), positions.to(device), mask[:, None])  # (B, T, C)
    x = x.flatten(0, 1)[torch.tensor(sources, device=device)]  # (number of tokens to predict, C)
    losses = token_losses(x, model.wte.weight, torch.tensor(targets, device=device)).cpu()
    return list(losses.split([len(ending) for row in rows for ending in row.endings]))


@torch.no_grad()
def score(model: GPT, groups: list[list[Row]], batch_tokens: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Yields, longest first, each example's index with its scores (2, endings): the summed and the mean negative
    log-likelihoods. groups: the rows of each example; batch_tokens: positions in a batch, padding included."""
    groups = sorted(groups, key=lambda rows: max(row.length for row in rows))
    while groups:
        width = max(row.length for row in groups[-1])
        batch: list[Row] = []
        while groups and (not batch or (len(batch) + len(groups[-1])) * width <= batch_tokens):
            batch += groups.pop()
        endings: dict[int, list[torch.Tensor]] = {}
        nlls = iter(token_nlls(model, batch))
        for row in batch:
            endings.setdefault(row.example, []).extend(next(nlls) for _ in row.endings)
        for index, tokens in endings.items():
            yield index, torch.stack([torch.stack([nll.sum(), nll.mean()]) for nll in tokens], dim=1)


def predict(model: GPT, tokenizer: Tokenizer, examples: list[Example], batch_tokens: int, dtype: torch.dtype,
            report: Callable[[int, torch.Tensor], None] = lambda *_: None) -> torch.Tensor:
    """Return each example's ending with the smallest sum and its ending with the smallest mean: (examples, 2), int64.

    dtype: of autocast. `report` is called with an example's index and its scores.
    """
    groups = [make_rows(i, example, tokenizer, model.config) for i, example in enumerate(examples)]
    choices = torch.empty(len(examples), 2, dtype=torch.int64)
    with torch.autocast(model.wte.weight.device.type, dtype, enabled=dtype != torch.float32):
        for index, scores in score(model, groups, batch_tokens):
            choices[index] = scores.argmin(1)
            report(index, scores)
    return choices


def evaluate(model: GPT, tokenizer: Tokenizer, examples: list[Example], dist: Distributed, dtype: torch.dtype,
             batch_tokens: int = 0, show_bar: bool = False, stopped: Callable[[], bool] = lambda: False) -> dict | None:
    """`acc` and `acc_norm` over the `examples`, which ranks share, with standard errors sqrt(p (1 - p) / (n - 1)).

    dtype: of autocast. batch_tokens: positions in a batch; 0: by the device. Use the uncompiled model. Return None if
    `stopped`, called after each example, is true on any rank.
    """
    was_training = model.training
    model.eval()
    mine = examples[dist.rank::dist.world_size]
    labels, choices = torch.tensor([example.label for example in mine]), torch.full((len(mine), 2), -1)
    no_bar = None if show_bar and dist.is_master else True  # None: where standard error is a terminal
    with (tqdm(total=len(mine), unit="example", disable=no_bar, dynamic_ncols=True, leave=None) as bar,
          contextlib.suppress(Interrupted)):
        def report(index: int, scores: torch.Tensor) -> None:
            bar.update()
            choices[index] = scores.argmin(1)
            accuracies = (choices == labels[:, None]).sum(0) / (choices[:, 0] >= 0).sum()
            bar.set_postfix_str("acc {:.4f}, acc_norm {:.4f}".format(*accuracies.tolist()), refresh=False)
            if stopped():
                raise Interrupted

        if mine:
            predict(model, tokenizer, mine, batch_tokens or BATCH_TOKENS.get(dist.device.type, 8192), dtype, report)
    model.train(was_training)
    right = (choices == labels[:, None]).sum(0).tolist()
    counts = dist.gather(torch.tensor([*right, len(mine), stopped()], dtype=torch.float32))
    right_sum, right_mean, n, stops = (round(sum(column)) for column in zip(*counts, strict=True))
    if stops:
        return None
    result: dict = {"examples": n}
    for name, p in (("acc", right_sum / n), ("acc_norm", right_mean / n)):
        result |= {name: p, f"{name}_stderr": math.sqrt(p * (1 - p) / max(n - 1, 1))}
    return result
