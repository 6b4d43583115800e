"""Evaluate the loss of a model: over batches, and over long texts with sliding windows."""

import contextlib
import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from gpt.distributed import Distributed
from gpt.errors import UserError
from gpt.loss import token_losses
from gpt.model import GPT
from gpt.tokenizer import Tokenizer


@torch.no_grad()
def evaluate_loss(model: GPT, batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
                  autocast: contextlib.AbstractContextManager, dist: Distributed,
                  tokenizer: Tokenizer | None) -> tuple[float, float | None]:
    """Return the mean loss in nats per token, and in bits per byte, over the (x, y) `batches` of all ranks.

    Every token has the same weight. Bits per byte compare models with different tokenizers; None without a tokenizer.
    Call it with the uncompiled model: switching a compiled one to evaluation mode would recompile it.
    """
    was_training = model.training
    model.eval()
    lengths = torch.from_numpy(tokenizer.token_lengths(model.config.vocab_size) if tokenizer else
                               np.zeros(model.config.vocab_size, dtype=np.int64)).to(dist.device)  # (vocab_size,)
    rows = []
    for x, y in batches:
        with autocast:
            loss = model(x, y)
        rows.append(torch.stack([loss * y.numel(), torch.full_like(loss, y.numel()), lengths[y].sum()]))
    model.train(was_training)
    # Sums in float64 on the CPU; a rank without batches adds 0.
    sums = torch.stack(rows).cpu().double().sum(0) if rows else torch.zeros(3, dtype=torch.float64)
    nats, n_tokens, n_bytes = map(sum, zip(*dist.gather(sums), strict=True))
    return nats / n_tokens, nats / math.log(2) / n_bytes if n_bytes else None


@torch.no_grad()
def sliding_window_losses(model: GPT, tokens: np.ndarray, stride: int,
                          batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (losses, targets) of each batch of windows: cross-entropies of `tokens` (1-D) in nats, and their ids.

    Windows of block_size tokens begin every `stride` tokens, as in Hugging Face's guide "Perplexity of fixed-length
    models". Each predicts the tokens that the previous one did not reach: every token but the first is predicted once,
    with at least block_size - stride tokens of context if there are that many. At stride block_size the windows do not
    overlap, and the first token of each is not predicted. Raises UserError for ids outside the vocabulary.
    """
    T, vocab_size, device = model.config.block_size, model.config.vocab_size, model.wte.weight.device
    begins = range(0, max(len(tokens) - T, 0) + stride, stride)  # the last window reaches the end
    for i in range(0, len(begins), batch_size):
        idx = np.zeros((len(begins[i:i + batch_size]), T), dtype=np.int64)  # a short last window is padded at its end
        targets = np.full_like(idx, -1)  # -1: no prediction
        for row, begin in enumerate(begins[i:i + batch_size]):
            window = tokens[begin:begin + T]
            first = max(T - stride, 1) if begin else 1  # the first token that the previous window did not reach
            idx[row, :len(window)] = window
            targets[row, first - 1:len(window) - 1] = window[first:]
        if idx.min() < 0 or idx.max() >= vocab_size:
            raise UserError(f"the data has token ids from {idx.min()} to {idx.max()}, expected 0 to {vocab_size - 1}: "
                            f"prepare the data with the model's tokenizer")
        predicted = targets >= 0
        x = model.hidden_states(torch.from_numpy(idx).to(device))[torch.from_numpy(predicted)]  # (n_targets, C)
        losses = token_losses(x, model.lm_head, torch.from_numpy(targets[predicted]).to(device))
        yield losses.double().cpu().numpy(), targets[predicted]
