"""Evaluate the loss of a model: over batches, and over long texts with sliding windows."""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from gpt.distributed import Ranks
from gpt.loss import token_losses
from gpt.model import GPT, evaluation_mode
from gpt.tokenizer import Tokenizer


@torch.no_grad()
def evaluate_loss(model: GPT, batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
                  ranks: Ranks, tokenizer: Tokenizer | None) -> tuple[float, float | None]:
    """Return the mean loss in nats per token, and in bits per byte, over the (x, y) `batches` of
    all ranks.

    Every token has the same weight. Bits per byte compare models with different tokenizers; None
    without a tokenizer. Call it with the uncompiled model: switching a compiled one to evaluation
    mode would recompile it.
    """
    vocab_size = model.config.vocab_size
    lengths = tokenizer.token_lengths(vocab_size) if tokenizer else np.zeros(vocab_size, np.int64)
    token_bytes = torch.from_numpy(lengths).to(ranks.device)  # (vocab_size,)
    rows = [torch.zeros(3, device=ranks.device)]  # nats, tokens and bytes of each batch
    with evaluation_mode(model):
        for x, y in batches:
            loss = model(x, y)
            n_tokens = torch.full_like(loss, y.numel())
            rows.append(torch.stack([loss * n_tokens, n_tokens, token_bytes[y].sum()]))
    sums = torch.stack(rows).cpu().double().sum(0)
    nats, tokens, n_bytes = ranks.mean(*sums)
    return nats / tokens, nats / math.log(2) / n_bytes if n_bytes else None


@torch.no_grad()
def sliding_window_losses(model: GPT, tokens: np.ndarray, stride: int,
                          batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (losses, targets) of each batch of windows: cross-entropies of `tokens` (1-D) in nats,
    and their ids.

    Windows of block_size tokens begin every `stride` tokens, as in Hugging Face's guide "Perplexity
    of fixed-length models". Each predicts the tokens that the previous one did not reach: every
    token but the first is predicted once, with at least block_size - stride tokens of context if
    there are that many. At stride block_size the windows do not overlap, and the first token of
    each is not predicted.
    """
    T = model.config.block_size
    device = model.wte.weight.device
    begins = range(0, max(len(tokens) - T, 0) + stride, stride)  # the last one reaches the end
    for i in range(0, len(begins), batch_size):
        batch = begins[i:i + batch_size]
        idx = np.zeros((len(batch), T), dtype=np.int64)  # a short last window is padded at its end
        targets = np.full_like(idx, -1)  # -1: no prediction
        for row, begin in enumerate(batch):
            window = tokens[begin:begin + T]
            # The first token that the previous window did not reach.
            first = max(T - stride, 1) if begin else 1
            idx[row, :len(window)] = window
            targets[row, first - 1:len(window) - 1] = window[first:]
        predicted = targets >= 0
        x = model.hidden_states(torch.from_numpy(idx).to(device))  # (windows, T, C)
        x = x[torch.from_numpy(predicted)]  # (n_targets, C)
        losses = token_losses(x, model.lm_head, torch.from_numpy(targets[predicted]).to(device))
        yield losses.double().cpu().numpy(), targets[predicted]
