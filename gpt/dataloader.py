"""DataLoaderLite: the tokens of each batch, a pure function of (seed, step, micro_step)."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from gpt.errors import UserError
from gpt.shards import find_shards, read_tokens, stat_shard


def permute_index(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the images of `index` (1-D, values below n) under a pseudo-random permutation of
    range(n); int64.

    A Feistel network (Luby and Rackoff 1988) permutes the numbers below the next power of four
    without a table: even shuffling ten billion sequences takes no memory and no start-up time.
    Results of n and above are permuted again until they fall below n ("cycle walking", Black and
    Rogaway 2002), so the whole is a permutation of range(n).
    """
    keys = np.random.SeedSequence((seed, epoch)).generate_state(6, np.uint64)
    half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half_bits)) - 1)
    out = index.astype(np.uint64)
    out_of_range = np.ones(len(out), dtype=bool)
    while out_of_range.any():
        left, right = out[out_of_range] >> half_bits, out[out_of_range] & mask
        for key in keys:  # mixing constants of splitmix64 (Steele et al. 2014)
            mixed = (right ^ key) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
        out[out_of_range] = (left << half_bits) | right
        out_of_range = out >= n
    return out.astype(np.int64)


def epoch_offset(seq_len: int, seed: int, epoch: int) -> int:
    """Return the shift of an epoch's sequences in tokens, below `seq_len`; 0 in the first epoch."""
    if epoch == 0:
        return 0
    state = np.random.SeedSequence((seed, epoch)).generate_state(7, np.uint64)
    return int(state[6] % seq_len)  # the first six are the keys of `permute_index`


class DataLoaderLite:
    """Batches of sequences from the shards of one split.

    A sequence is `seq_len` input tokens; the targets are the inputs shifted by one. Every shard is
    cut into sequences from its start. Epoch e visits each sequence once, in an order given by
    (seed, e). From the second epoch on, all sequences shift right by an offset below `seq_len`,
    also given by (seed, e), so that every epoch cuts the text at other places. This skips the
    shard's first `offset` tokens; a last sequence that would run past the shard's end is moved
    back. Step s takes the next `total_batch_size / seq_len` sequences, split across micro-steps and
    ranks. The tokens of a step depend on (seed, s) alone, so the loader has no state to save.

    A shard is open only while a sequence is read from it: there can be more shards than a process
    may have open files.

    Raises UserError if shards are missing, unreadable or shorter than one sequence, or if
    total_batch_size is not divisible; batches raise it for token ids outside the vocabulary and for
    a shard that has changed since the start.
    """

    def __init__(self, data_root: str | Path, split: str, *, micro_batch_size: int, seq_len: int,
                 vocab_size: int, total_batch_size: int | None = None, seed: int = 1337,
                 rank: int = 0, world_size: int = 1, device: str | torch.device = "cpu"):
        self.micro_batch_size = micro_batch_size
        self.seq_len = seq_len
        self.vocab_size = vocab_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device(device)
        self.grad_accum_steps = grad_accum_steps(total_batch_size, micro_batch_size, seq_len,
                                                 world_size)
        self.shards = [stat_shard(path) for path in find_shards(data_root, split)]
        n_sequences = [max(shard.length - 1, 0) // seq_len for shard in self.shards]
        if not any(n_sequences):
            longest = max(self.shards, key=lambda shard: shard.length)
            advice = "pass --seq_len auto" if longest.length > 32 else "prepare more text"
            raise UserError(f"shard {longest.path} has {longest.length} tokens, one sequence needs "
                            f"seq_len + 1 = {seq_len + 1}: {advice}")
        # (shards + 1,): index of each shard's first sequence
        self.first_sequence = np.cumsum([0, *n_sequences])
        self.n_sequences = int(self.first_sequence[-1])
        self.epoch_tokens = self.n_sequences * seq_len

    def batch(self, step: int, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's micro-batch: (x, y), each (B, T) int64 on the loader's device."""
        micro_batches = (step * self.grad_accum_steps + micro_step) * self.world_size + self.rank
        n_before = micro_batches * self.micro_batch_size  # sequences of all earlier micro-batches
        return self.load_batch(*self.sequences_at(n_before + np.arange(self.micro_batch_size)))

    def sequences_at(self, sequence_index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the sequences at `sequence_index`, counted across epochs, and their offsets in
        tokens; all (B,)."""
        epochs, index = np.divmod(sequence_index, self.n_sequences)
        sequences, offsets = np.empty_like(index), np.empty_like(index)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            sequences[chosen] = permute_index(index[chosen], self.n_sequences, self.seed, epoch)
            offsets[chosen] = epoch_offset(self.seq_len, self.seed, epoch)
        return sequences, offsets

    def eval_batches(self, eval_tokens: int,
                     show_bar: bool = False) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield this rank's part of the first `eval_tokens` tokens (at least one sequence) as
        batches (x, y), each (B, T).

        The last batch may be smaller, and ranks may have different numbers of batches (even 0):
        weight losses by their tokens and sum them over ranks.
        """
        count = min(max(eval_tokens // self.seq_len, 1), self.n_sequences)
        sequences = np.arange(self.rank, count, self.world_size)
        begins = range(0, len(sequences), self.micro_batch_size)
        for i in tqdm(begins, "validation", leave=False, dynamic_ncols=True, disable=not show_bar):
            batch = sequences[i:i + self.micro_batch_size]
            yield self.load_batch(batch, np.zeros_like(batch))

    def load_batch(self, sequences: np.ndarray,
                   offsets: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens of `sequences` (B,), shifted right by `offsets` (B,) tokens, as (x, y),
        each (B, T) int64 on the loader's device."""
        rows = np.empty((len(sequences), self.seq_len + 1), dtype=np.int64)
        for row, sequence, offset in zip(rows, sequences, offsets, strict=True):
            index = np.searchsorted(self.first_sequence, sequence, side="right") - 1
            shard = self.shards[index]
            start = (sequence - self.first_sequence[index]) * self.seq_len + offset
            start = min(int(start), shard.length - self.seq_len - 1)
            row[:] = read_tokens(shard, start, self.seq_len + 1, self.vocab_size)
        tokens = torch.from_numpy(rows)
        if self.device.type == "cuda":  # copies from pinned memory overlap with the GPU's work
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
        else:
            tokens = tokens.to(self.device)
        return tokens[:, :-1], tokens[:, 1:]


def grad_accum_steps(total_batch_size: int | None, micro_batch_size: int, seq_len: int,
                     world_size: int) -> int:
    """Return the number of micro-steps per rank in a step of `total_batch_size` tokens (None: one
    micro-step).

    Raises UserError, with valid values, if that is not a whole number.
    """
    for name, value in (("micro_batch_size", micro_batch_size), ("seq_len", seq_len),
                        ("total_batch_size", total_batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: must be at least 1")
    if total_batch_size is None:
        return 1
    tokens = micro_batch_size * seq_len * world_size
    if total_batch_size % tokens == 0:
        return total_batch_size // tokens
    below = total_batch_size // tokens * tokens
    nearest = " or ".join(str(value) for value in (below, below + tokens) if value)
    sequences, rest = divmod(total_batch_size, seq_len * world_size)
    divisors = [] if rest else [b for b in range(1, micro_batch_size) if sequences % b == 0]
    smaller = f", or --micro_batch_size {divisors[-1]}" if divisors else ""
    raise UserError(f"total_batch_size {total_batch_size} is not divisible by micro_batch_size x "
                    f"seq_len x world_size = {micro_batch_size} x {seq_len} x {world_size} = "
                    f"{tokens}: use --total_batch_size {nearest}{smaller}")
