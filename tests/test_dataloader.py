"""gpt/dataloader.py and gpt/shards.py: every sequence once per epoch, whatever shares them out."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.dataloader import DataLoaderLite, grad_accum_steps, permute_index
from gpt.errors import UserError
from gpt.shards import open_shard
from tests.conftest import ROOT


def make_shards(folder, lengths, split="train", dtype=np.uint16):
    """Shards in which every token id says where it stands: 0, 1, 2, … through all shards."""
    start = 0
    for index, length in enumerate(lengths):
        np.save(folder / f"{split}_{index:05d}.npy", np.arange(start, start + length, dtype=dtype))
        start += length


def loader(folder, **changes):
    settings = dict(split="train", micro_batch_size=2, seq_len=8, vocab_size=50257)
    return DataLoaderLite(folder, **{**settings, **changes})


def starts(batch):
    """The first token of each sequence of a batch: which sequences they are."""
    x, y = batch
    assert x.shape == y.shape and x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])  # targets are the same sequence shifted by one
    assert torch.equal(y[:, -1], x[:, -1] + 1)
    return x[:, 0].tolist()


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 1000))
def test_permute_index_is_a_permutation(n, seed, epoch):
    """A sequence that came twice would mean another that never comes."""
    assert sorted(permute_index(np.arange(n), n, seed, epoch).tolist()) == list(range(n))


def test_permute_index_looks_random():
    """A weak mixing would train on the text nearly in order. Compared with what a random permutation does."""
    n = 10_000
    once, again = permute_index(np.arange(n), n, 1, 0), permute_index(np.arange(n), n, 1, 1)
    for order in (once, again, once[np.argsort(again)]):
        correlation = np.corrcoef(np.arange(n), order)[0, 1]
        assert abs(correlation) < 4 / np.sqrt(n)
        neighbours = np.count_nonzero(np.abs(np.diff(order)) == 1)  # about 2 in a random one
        assert neighbours < 12
        fixed = np.count_nonzero(order == np.arange(n))  # about 1
        assert fixed < 8


@settings(deadline=None, max_examples=60)
@given(lengths=st.lists(st.integers(9, 90), min_size=1, max_size=4), sequences_per_step=st.sampled_from([12, 24, 36]),
       lives=st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.sampled_from([1, 2]), st.integers(1, 9)), max_size=5))
def test_every_sequence_once_per_epoch(tmp_path_factory, lengths, sequences_per_step, lives):
    """Whatever the shards, and although every life of the run has other ranks and micro-batches and ends anywhere:
    E epochs show every sequence exactly E times, in any order."""
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder, lengths)
    offsets = np.cumsum([0, *lengths])
    expected = sorted(int(offset) + start for offset, length in zip(offsets, lengths, strict=False)
                      for start in range(0, length - 8, 8))
    step, seen = 0, []
    for world_size, micro_batch_size, steps in [*lives, (1, 2, 2 * len(expected) // sequences_per_step + 1)]:
        ranks = [loader(folder, micro_batch_size=micro_batch_size, total_batch_size=sequences_per_step * 8, rank=rank,
                        world_size=world_size) for rank in range(world_size)]
        assert ranks[0].n_sequences == len(expected)
        for _ in range(steps):
            for micro_step in range(ranks[0].grad_accum_steps):
                for rank in ranks:
                    seen += starts(rank.batch(step, micro_step))
            step += 1
    epochs = [sorted(seen[at:at + len(expected)]) for at in range(0, len(seen), len(expected))]
    assert len(epochs) >= 2 and all(epoch == expected for epoch in epochs[:len(seen) // len(expected)])


def test_the_sequences_of_a_step_depend_on_seed_and_step_alone(tmp_path):
    """What makes world size, micro-batch and resume point free to change."""
    make_shards(tmp_path, [500, 300, 420])
    plain = loader(tmp_path, micro_batch_size=12, total_batch_size=96)
    steps = [sorted(starts(plain.batch(step, 0))) for step in range(20)]
    for world_size, micro_batch_size in [(1, 1), (2, 3), (3, 2), (4, 3), (12, 1)]:
        ranks = [loader(tmp_path, micro_batch_size=micro_batch_size, total_batch_size=96, rank=rank,
                        world_size=world_size) for rank in range(world_size)]
        for step in (0, 7, 19, 3):  # in any order: the position is the step and nothing else
            seen = []
            for rank in ranks:
                for micro_step in range(rank.grad_accum_steps):
                    seen += starts(rank.batch(step, micro_step))
            assert sorted(seen) == steps[step]
    other_seed = loader(tmp_path, micro_batch_size=12, total_batch_size=96, seed=1)
    assert sorted(starts(other_seed.batch(0, 0))) != steps[0]


def test_validation_covers_the_first_tokens_once(tmp_path):
    """The validation loss must be the same number whatever the ranks and the micro-batch."""
    make_shards(tmp_path, [100, 60], split="val")
    first = [*range(0, 99 - 8, 8), *range(100, 159 - 8, 8)]
    for eval_tokens, count in [(1, 1), (80, 10), (87, 10), (10_000, 19)]:
        for world_size, micro_batch_size in [(1, 1), (1, 4), (2, 3), (3, 16), (25, 1)]:
            seen = []
            for rank in range(world_size):
                val = loader(tmp_path, split="val", micro_batch_size=micro_batch_size, rank=rank, world_size=world_size)
                for batch in map(val.load_batch, val.eval_batches(eval_tokens)):
                    seen += starts(batch)
            assert sorted(seen) == first[:count]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64, ">u2"])
def test_any_integer_type_is_read(tmp_path, dtype):
    """People make their own shards with np.save, which makes int64."""
    make_shards(tmp_path, [100], dtype=dtype)
    assert starts(loader(tmp_path, micro_batch_size=12).batch(0, 0)) != []


def test_opening_a_large_shard_does_not_read_it(tmp_path):
    """100 million tokens are 200 MB: less than 50 MB in a fresh process."""
    np.lib.format.open_memmap(tmp_path / "train_00000.npy", mode="w+", dtype=np.uint16, shape=(100_000_000,))
    code = f"""
import resource
from gpt.dataloader import DataLoaderLite
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB
before = peak()
DataLoaderLite({str(tmp_path)!r}, "train", micro_batch_size=2, seq_len=32, vocab_size=50257).batch(0, 0)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50_000


@pytest.mark.parametrize("bad, place", [(50257, 70), (-1, 3), (60000, 99)])
def test_a_token_outside_the_vocabulary_is_named(tmp_path, bad, place):
    """It would be an index error deep inside the embedding, or on a GPU the end of the process."""
    tokens = np.arange(100, dtype=np.int64)
    tokens[place] = bad
    np.save(tmp_path / "train_00000.npy", tokens)
    data = loader(tmp_path, seq_len=9, micro_batch_size=11)
    with pytest.raises(UserError, match=f"train_00000.npy has token id {bad} at position {place}"):
        data.batch(0, 0)


def test_bad_shards_are_refused(tmp_path):
    """Each with its name and what is wrong."""
    path = tmp_path / "train_00000.npy"

    def refused(words, content=None):
        if content is not None:
            np.save(path, content, allow_pickle=True)
        with pytest.raises(UserError, match=words):
            loader(tmp_path)

    with pytest.raises(UserError, match="is not a folder"):
        loader(tmp_path / "missing")
    refused("no shards for split train")
    refused("expected a 1-D array of integers", np.zeros((3, 40), np.uint16))
    refused("expected a 1-D array of integers", np.zeros(100, np.float32))
    refused("cannot be read", np.array(["a", {}], dtype=object))
    refused("has 8 tokens: one sequence needs seq_len . 1 = 9", np.zeros(8, np.uint16))
    np.save(path, np.zeros(1000, np.uint16))
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused("train_00000.npy cannot be read")
    path.write_bytes(whole)
    assert len(open_shard(path)) == 1000


@pytest.mark.parametrize("total, micro, seq_len, world_size", [(1008, 4, 8, 3), (1000, 4, 8, 3), (10, 4, 8, 1),
                                                               (32768, 16, 256, 3), (32768, 12, 256, 8)])
def test_a_batch_that_does_not_divide_names_values_that_do(total, micro, seq_len, world_size):
    """The values it suggests must work."""
    with pytest.raises(UserError, match=f"total_batch_size {total} is not divisible") as refusal:
        grad_accum_steps(total, micro, seq_len, world_size)
    advice = str(refusal.value).split("use ")[1]
    totals = re.search(r"--total_batch_size (\d+)(?: or (\d+))?", advice).groups()
    assert all(grad_accum_steps(int(value), micro, seq_len, world_size) >= 1 for value in totals if value)
    if smaller := re.search(r"--micro_batch_size (\d+)", advice):
        assert grad_accum_steps(total, int(smaller[1]), seq_len, world_size) >= 1
    else:
        assert total % (seq_len * world_size)


def test_grad_accum_steps():
    """The guide's run on one process and on two."""
    assert grad_accum_steps(32768, 16, 256, 1) == 8
    assert grad_accum_steps(32768, 16, 256, 2) == 4
