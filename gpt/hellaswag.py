"""HellaSwag (Zellers et al. 2019): choose which of four endings continues a text.

Completion style: each ending is appended to the context after a space, and the model chooses the
ending with the smallest negative log-likelihood (NLL), summed over its tokens (`acc`) or averaged
(`acc_norm`). On the 10,042 examples of the validation split GPT-2 124M reaches acc 0.2859 and
acc_norm 0.2955, GPT-2 XL 0.3842 and 0.4893; chance is 0.25. lm-evaluation-harness puts the topic
before the context and averages over bytes, so its numbers differ.

The usual implementation runs the model once per ending, with logits at every position. Here one row
packs the context and its four endings: each ending keeps the positions it would have alone, and a
mask lets it attend only to the context and itself. Rows of similar length share a batch, and the LM
head runs only on positions that predict ending tokens.
"""

import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from gpt.config import GPTConfig
from gpt.distributed import Ranks
from gpt.errors import UserError
from gpt.loss import token_losses
from gpt.model import GPT, evaluation_mode
from gpt.tokenizer import Tokenizer

BATCH_TOKENS = {"cpu": 1024, "mps": 8192, "cuda": 32768}  # positions per batch, by device type


@dataclass
class Example:
    """A context, its four endings, and the index of the correct one."""

    context: str
    endings: list[str]
    label: int


def load_examples(data: str | None = None, limit: int = 0) -> list[Example]:
    """Return the first `limit` examples (0: all) of a .jsonl file in the original format.

    data: path of the file; None: the validation split of Rowan/hellaswag on the Hugging Face hub.
    Raises UserError if the file or the hub cannot be read, or an example is invalid.
    """
    source, examples = data or "Rowan/hellaswag", []
    try:
        for record in itertools.islice(read_records(data), limit or None):
            # Labels on the hub are str.
            example = Example(record["ctx"], list(record["endings"]), int(record["label"]))
            texts = [example.context, *example.endings]
            has_texts = len(texts) == 5 and all(isinstance(text, str) and text for text in texts)
            if not has_texts or example.label not in range(4):
                raise ValueError(f"{len(example.endings)} endings, label {example.label}, "
                                 f"or an empty text")
            examples.append(example)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"example {len(examples) + 1} of {source} is invalid ({error!r}): expected "
                        f"a context `ctx`, four `endings` and a `label` from 0 to 3") from None
    if not examples:
        raise UserError(f"HellaSwag data {source} has no examples: "
                        f"expected one JSON object per line")
    return examples


def read_records(data: str | None) -> Iterable[dict]:
    """Return the records of a .jsonl file or, if None, of the hub's split.

    Raises UserError if they cannot be read.
    """
    try:
        if data is None:
            import datasets  # takes seconds
            return datasets.load_dataset("Rowan/hellaswag", split="validation")
        lines = Path(data).read_text("utf-8-sig").split("\n")
    except Exception as error:  # the disk, the network or the hub
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(f"HellaSwag data {data or 'Rowan/hellaswag'} cannot be read ({reason}): "
                        f"pass the path of hellaswag_val.jsonl as --data (in training: "
                        f"--hellaswag_data)") from None
    return (json.loads(line) for line in lines if line.strip())


def pack_example(index: int, example: Example, tokenizer: Tokenizer,
                 config: GPTConfig) -> list[torch.Tensor]:
    """Return the example's rows: one for all four endings or, if an ending does not fit
    into block_size, one for each.

    Each row is (T, 4) int64: input token, position, segment id, target token. The segment id is 0
    in the context and 1 + 4 * index + i where ending i is predicted, from the context's last token
    on, which is repeated for every ending. Texts that do not fit are truncated on the left. Raises
    UserError for tokens outside the model's vocabulary.
    """
    context = tokenizer.encode(example.context)
    endings = [tokenizer.encode(" " + ending) for ending in example.endings]
    if (largest := max(map(max, [context, *endings]))) >= config.vocab_size:
        raise UserError(f"HellaSwag has token id {largest}, but the model's vocabulary has "
                        f"{config.vocab_size} tokens: use a model with the full vocabulary of its "
                        f"tokenizer")
    fits = len(context) + max(map(len, endings)) - 1 <= config.block_size
    rows: list[list[tuple]] = []
    for i, ending in enumerate(endings):
        tokens = (context + ending)[-config.block_size - 1:]
        # The first position that predicts a token of the ending.
        begin = max(len(tokens) - 1 - len(ending), 0)
        if i == 0 or not fits:
            rows.append([(tokens[t], t, 0, 0) for t in range(begin)])
        rows[-1] += [(tokens[t], t, 1 + 4 * index + i, tokens[t + 1])
                     for t in range(begin, len(tokens) - 1)]
    return [torch.tensor(row) for row in rows]


def token_nlls(model: GPT, rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the NLL in nats of each ending's tokens in a batch of packed rows,
    and their segment ids; both (N,)."""
    batch = pad_sequence(rows, batch_first=True).to(model.wte.weight.device)
    idx, positions, segment_ids, targets = batch.unbind(2)  # each (B, T); padding has segment id 0
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]
    mask = ((key == 0) | (key == query)).tril()  # (B, T, T)
    x = model.hidden_states(idx, positions, mask[:, None])  # (B, T, C)
    is_ending = segment_ids > 0
    nlls = token_losses(x[is_ending], model.lm_head, targets[is_ending])
    return nlls.cpu(), segment_ids[is_ending].cpu()


@torch.no_grad()
def score_endings(model: GPT, tokenizer: Tokenizer, examples: list[Example],
                  batch_tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield after each batch the summed NLL of each ending's tokens, in nats, and their number;
    both (examples, 4).

    Endings that are not scored yet have 0 tokens.
    batch_tokens: positions per batch, including padding.
    """
    rows: list[torch.Tensor] = []
    for i, example in enumerate(examples):
        rows += pack_example(i, example, tokenizer, model.config)
    rows.sort(key=len, reverse=True)
    sums, counts = torch.zeros(2, 1 + 4 * len(examples))  # by segment id
    while rows:
        batch_size = max(batch_tokens // len(rows[0]), 1)
        nlls, segment_ids = token_nlls(model, rows[:batch_size])
        sums.index_add_(0, segment_ids, nlls)
        counts += segment_ids.bincount(minlength=len(counts))
        yield sums[1:].view(-1, 4), counts[1:].view(-1, 4)
        del rows[:batch_size]


def evaluate_hellaswag(model: GPT, tokenizer: Tokenizer, examples: list[Example],
                       ranks: Ranks, show_bar: bool = False,
                       stopped: Callable[[], bool] = lambda: False) -> dict | None:
    """Return `acc` and `acc_norm` over the `examples`, split across ranks, with standard errors of
    a proportion.

    Return None if `stopped`, called after each batch, is true on any rank. Call it with the
    uncompiled model.
    """
    local_examples = examples[ranks.rank::ranks.world_size]
    batch_tokens = BATCH_TOKENS[ranks.device.type]
    labels = torch.tensor([example.label for example in local_examples])
    correct = torch.zeros(2, dtype=torch.int64)
    bar = tqdm(total=len(labels), unit="example", disable=not (show_bar and ranks.is_master),
               dynamic_ncols=True, leave=None, mininterval=0.1 if sys.stderr.isatty() else 30)
    with evaluation_mode(model), bar:
        for sums, counts in score_endings(model, tokenizer, local_examples, batch_tokens):
            is_scored = (counts > 0).all(1)
            choices = torch.stack([sums, sums / counts]).argmin(2)  # (2, examples)
            correct = (is_scored & (choices == labels)).sum(1)
            acc, acc_norm = (correct / is_scored.sum()).tolist()
            bar.set_postfix_str(f"acc {acc:.4f}, acc_norm {acc_norm:.4f}", refresh=False)
            bar.update(int(is_scored.sum()) - bar.n)
            if stopped():
                break
    n_acc, n_acc_norm, n, n_stopped = ranks.mean(*correct, len(labels), stopped())
    if n_stopped:
        return None
    result: dict = {"examples": len(examples)}
    for name, p in (("acc", n_acc / n), ("acc_norm", n_acc_norm / n)):
        stderr = math.sqrt(p * (1 - p) / max(len(examples) - 1, 1))
        result |= {name: p, f"{name}_stderr": stderr}
    return result
