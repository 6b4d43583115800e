"""DataLoaderLite: which tokens are in which batch, as a pure function of (seed, step, micro_step)."""

from pathlib import Path

import numpy as np
import torch

from gpt.errors import UserError
from gpt.shards import find_shards, longest_seq_len, open_shard


def permute_index(index: np.ndarray, n: int, seed: int, epoch: int) -> np.ndarray:
    """Return where a pseudo-random permutation of range(n) sends each `index` (1-D, values below n); int64.

    A Feistel network (Luby and Rackoff 1988) permutes the numbers below the next power of four without a table: even
    shuffling ten billion sequences takes no memory and no start-up time. Results of n and above are permuted again
    until they fall below n ("cycle walking", Black and Rogaway 2002), so the whole is a permutation of range(n).
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
    return int(np.random.SeedSequence((seed, epoch)).generate_state(7, np.uint64)[6] % seq_len) if epoch else 0


class DataLoaderLite:
    """Batches of sequences from the shards of one split.

    A sequence is `seq_len` input tokens; the targets are the inputs shifted by one. Every shard is cut into sequences
    from its start. Epoch e visits each sequence once, in an order given by (seed, e). From the second epoch on, all
    sequences shift right by an offset below `seq_len`, also given by (seed, e), so that every epoch cuts the text at
    other places. This skips the shard's first `offset` tokens; a last sequence that would run past the shard's end is
    moved back. Step s takes the next `total_batch_size / seq_len` sequences, split across micro-steps and ranks. The
    tokens of a step depend on (seed, s) alone, so the loader has no state to save.

    Raises UserError if shards are missing, unreadable or shorter than one sequence, or if total_batch_size is not
    divisible; `batch` and `load_batch` raise it for token ids outside the vocabulary.
    """

    def __init__(self, data_root: str | Path, split: str, *, micro_batch_size: int, seq_len: int, vocab_size: int,
                 total_batch_size: int | None = None, seed: int = 1337, rank: int = 0, world_size: int = 1,
                 device: str | torch.device = "cpu"):
        self.micro_batch_size, self.seq_len, self.vocab_size, self.seed = micro_batch_size, seq_len, vocab_size, seed
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.grad_accum_steps = grad_accum_steps(total_batch_size, micro_batch_size, seq_len, world_size)
        self.paths = find_shards(data_root, split)
        self.shards = [open_shard(path) for path in self.paths]
        n_sequences = [max(len(shard) - 1, 0) // seq_len for shard in self.shards]  # 0 in a shard that is too short
        if not any(n_sequences):
            longest, length = max(enumerate(map(len, self.shards)), key=lambda item: item[1])
            fits = longest_seq_len(length)
            raise UserError(f"shard {self.paths[longest]} has {length} tokens, one sequence needs seq_len + 1 = "
                            f"{seq_len + 1}: " + (f"pass --seq_len {fits}, as --seq_len auto does" if 0 < fits < seq_len
                                                  else "lower --seq_len") + ", or prepare more text")
        self.shard_offsets = np.cumsum([0, *n_sequences])  # (shards + 1,): index of each shard's first sequence
        self.n_sequences = int(self.shard_offsets[-1])

    def batch(self, step: int, micro_step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's micro-batch: (x, y), each (B, T) int64 on the loader's device."""
        micro_batches = (step * self.grad_accum_steps + micro_step) * self.world_size + self.rank  # before this one
        positions = micro_batches * self.micro_batch_size + np.arange(self.micro_batch_size)
        return self.load_batch(*self.sequences_at(positions))

    def sequences_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the sequences at `positions`, counted across epochs, and their offsets in tokens; all (B,)."""
        epochs, index = np.divmod(positions, self.n_sequences)
        sequences, offsets = np.empty_like(index), np.empty_like(index)
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            sequences[chosen] = permute_index(index[chosen], self.n_sequences, self.seed, epoch)
            offsets[chosen] = epoch_offset(self.seq_len, self.seed, epoch)
        return sequences, offsets

    def eval_batches(self, eval_tokens: int) -> list[np.ndarray]:
        """Return this rank's sequences of the first `eval_tokens` tokens (at least one sequence), as batches for
        `load_batch`.

        The last batch may be smaller, and ranks may have different numbers of batches (even 0): weight losses by their
        tokens and sum them over ranks.
        """
        count = min(max(eval_tokens // self.seq_len, 1), self.n_sequences)
        sequences = np.arange(self.rank, count, self.world_size)
        return [sequences[i:i + self.micro_batch_size] for i in range(0, len(sequences), self.micro_batch_size)]

    def load_batch(self, sequences: np.ndarray, offsets: np.ndarray | int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the tokens of sequences (B,) as (x, y), each (B, T) int64 on the loader's device.

        offsets (B,): shift of each sequence in tokens; one that would run past its shard's end is moved back.
        """
        rows = np.empty((len(sequences), self.seq_len + 1), dtype=np.int64)
        for row, sequence, offset in zip(rows, sequences, np.broadcast_to(offsets, sequences.shape), strict=True):
            shard = np.searchsorted(self.shard_offsets, sequence, side="right") - 1
            start = (sequence - self.shard_offsets[shard]) * self.seq_len + offset
            start = min(start, len(self.shards[shard]) - self.seq_len - 1)
            row[:] = self.shards[shard][start:start + self.seq_len + 1]
            if row.min() < 0 or row.max() >= self.vocab_size:
                at = np.flatnonzero((row < 0) | (row >= self.vocab_size))[0]
                raise UserError(f"shard {self.paths[shard]} has token id {row[at]} at position {start + at}, expected "
                                f"0 to {self.vocab_size - 1}: prepare the data with the model's tokenizer")
        tokens = torch.from_numpy(rows)
        if self.device.type == "cuda":  # copies from pinned memory overlap with the GPU's work
            tokens = tokens.pin_memory().to(self.device, non_blocking=True)
        else:
            tokens = tokens.to(self.device)
        return tokens[:, :-1], tokens[:, 1:]


def grad_accum_steps(total_batch_size: int | None, micro_batch_size: int, seq_len: int, world_size: int) -> int:
    """Return the number of micro-steps per rank in a step of `total_batch_size` tokens (None: one micro-step).

    Raises UserError, with valid values, if that is not a whole number.
    """
    for name, value in (("micro_batch_size", micro_batch_size), ("seq_len", seq_len),
                        ("total_batch_size", total_batch_size)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: must be at least 1")
    tokens = micro_batch_size * seq_len * world_size
    if total_batch_size is None:
        return 1
    if total_batch_size % tokens:
        below = total_batch_size // tokens * tokens
        nearest = " or ".join(str(value) for value in (below, below + tokens) if value)
        sequences, rest = divmod(total_batch_size, seq_len * world_size)
        fits = [] if rest else [b for b in range(min(micro_batch_size, sequences), 0, -1) if sequences % b == 0]
        smaller = f", or --micro_batch_size {fits[0]}" if fits else ""
        raise UserError(f"total_batch_size {total_batch_size} is not divisible by micro_batch_size x seq_len x "
                        f"world_size = {micro_batch_size} x {seq_len} x {world_size} = {tokens}: "
                        f"use --total_batch_size {nearest}{smaller}")
    return total_batch_size // tokens
