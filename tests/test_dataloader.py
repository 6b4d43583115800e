"""gpt/dataloader.py: every sequence once per epoch, in an order that depends on the seed alone."""

import os
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.dataloader import DataLoaderLite, epoch_offset, grad_accum_steps, permute_index
from gpt.errors import UserError


def make_shards(folder, lengths, dtype=np.uint16):
    """Write shards in which every token id is its position: 0, 1, 2, … through all shards."""
    begin = 0
    for index, length in enumerate(lengths):
        tokens = np.arange(begin, begin + length, dtype=dtype)
        np.save(folder / f"train_{index:05d}.npy", tokens)
        begin += length


def sequence_starts(lengths, offset=0):
    """Return the first token of each sequence of 8, in order: cuts start at `offset` in every
    shard."""
    return [sum(lengths[:index]) + min(start + offset, length - 9)
            for index, length in enumerate(lengths) for start in range(0, length - 8, 8)]


def loader(folder, micro_batch_size=2, **options):
    return DataLoaderLite(folder, "train", micro_batch_size=micro_batch_size, seq_len=8,
                          vocab_size=50257, **options)


def starts(batch):
    """Return the first token of each sequence of a batch, after checking that targets are inputs
    shifted by one."""
    x, y = batch
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(x + 1, y)
    return x[:, 0].tolist()


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 1000), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_permute_index_equals_its_formula(n, seed, epoch):
    """A Feistel network in Python integers. The order must not change, so that old runs resume
    exactly."""
    bits = next(bits for bits in range(1, 6) if n <= 4**bits)

    def permute(value):
        left, right = divmod(value, 2**bits)
        for key in np.random.SeedSequence((seed, epoch)).generate_state(6, np.uint64).tolist():
            mixed = (right ^ key) * 0xBF58476D1CE4E5B9 % 2**64
            mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
            left, right = right, left ^ (mixed ^ mixed >> 31) % 2**bits
        value = left * 2**bits + right
        return value if value < n else permute(value)

    order = permute_index(np.arange(n), n, seed, epoch).tolist()
    assert order == [permute(value) for value in range(n)]
    assert sorted(order) == list(range(n))


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(0, 90), max_size=3),
       dtype=st.sampled_from([np.uint16, np.int64, np.uint64, ">u2"]),
       micro_batch_size=st.sampled_from([1, 3, 10]), micro_steps=st.integers(1, 3),
       world_size=st.integers(1, 3))
def test_epochs_visit_every_sequence_once(tmp_path_factory, lengths, dtype, micro_batch_size,
                                          micro_steps, world_size):
    """In an order that depends on the seed alone: ranks share a step micro-step by micro-step and
    rank by rank. For any shards (some too short for a sequence) and integer dtypes. Later epochs
    cut the text at other places."""
    folder = tmp_path_factory.mktemp("shards")
    lengths += [24]
    make_shards(folder, lengths, dtype)
    total_batch_size = 8 * micro_batch_size * micro_steps * world_size
    ranks = [loader(folder, micro_batch_size, total_batch_size=total_batch_size, rank=rank,
                    world_size=world_size, seed=7) for rank in range(world_size)]
    n = ranks[0].n_sequences
    seen = [start for step in range(3 * n) for micro_step in range(micro_steps) for rank in ranks
            for start in starts(rank.batch(step, micro_step))]
    for epoch in range(3):
        in_text = sequence_starts(lengths, epoch_offset(8, 7, epoch))
        order = permute_index(np.arange(n), n, 7, epoch)
        assert seen[epoch * n:(epoch + 1) * n] == [in_text[i] for i in order]


@pytest.mark.parametrize("world_size, micro_batch_size", [(1, 4), (25, 1)])
def test_eval_batches_cover_the_first_tokens_once(tmp_path, world_size, micro_batch_size):
    """The val loss must not depend on the number of ranks or the micro-batch size."""
    make_shards(tmp_path, [60, 100])
    ranks = [loader(tmp_path, micro_batch_size, rank=rank, world_size=world_size)
             for rank in range(world_size)]
    seen = [start for rank in ranks for batch in rank.eval_batches(87) for start in starts(batch)]
    assert sorted(seen) == sequence_starts([60, 100])[:10]


def test_large_shards_are_not_read_into_memory(tmp_path):
    """The first batch from 100 million tokens (200 MB) takes less than 1 MB."""
    np.lib.format.open_memmap(tmp_path / "train_00000.npy", "w+", np.uint16, (100_000_000,))
    tracemalloc.start()
    loader(tmp_path).batch(0, 0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1e6


def test_batch_refuses_a_shard_that_changed_during_the_run(tmp_path):
    """Otherwise a run would continue with other tokens than its checkpoints say."""
    make_shards(tmp_path, [100])
    train = loader(tmp_path)
    os.utime(tmp_path / "train_00000.npy", (0, 0))
    with pytest.raises(UserError, match="train_00000.npy has changed since the start of the run"):
        train.batch(0, 0)


@pytest.mark.parametrize("token", [50257, -1])
def test_batch_names_a_token_outside_the_vocabulary(tmp_path, token):
    """Otherwise it would be an index error inside the embedding, which on a GPU aborts the
    process."""
    tokens = np.arange(100)
    tokens[70] = token
    np.save(tmp_path / "train_00000.npy", tokens)
    with pytest.raises(UserError, match=f"train_00000.npy has token id {token} at position 70"):
        loader(tmp_path, micro_batch_size=12).batch(0, 0)


def test_grad_accum_steps_names_values_that_divide():
    advice = "use --total_batch_size 960 or 1056, or --micro_batch_size 3"
    with pytest.raises(UserError, match=advice):
        grad_accum_steps(1008, micro_batch_size=4, seq_len=8, world_size=3)
