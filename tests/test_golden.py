"""Golden values that existing runs depend on and that must never change silently.

If one changes on purpose, say so in the commit: older runs will no longer resume exactly.
"""

import numpy as np
import pytest

from gpt.dataloader import DataLoaderLite
from scripts import prepare
from tests.conftest import TEXT, TINY_BYTES, metrics, train

FIRST_LOSSES = [5.5464, 5.4845, 5.3579, 5.2033, 5.0094, 4.8002, 4.6298, 4.4194, 4.3230, 4.2224]


def test_train_repeats_golden_losses(byte_data, tmp_path):
    """They depend on initialization, data order, loss, AdamW, clipping and schedule."""
    train(byte_data, tmp_path / "log", *TINY_BYTES, "--max_steps", "10", "--eval_every", "0")
    losses = [record["loss"] for record in metrics(tmp_path / "log", "train").values()]
    assert losses == pytest.approx(FIRST_LOSSES, abs=5e-4)


def test_dataloader_repeats_golden_order(byte_data):
    """For seed 1337 and the 998 sequences of this data, in the first and in the second epoch."""
    loader = DataLoaderLite(byte_data, "train", micro_batch_size=4, seq_len=32, vocab_size=256,
                            total_batch_size=256)
    first, offsets = loader.sequences_at(np.arange(12))
    assert first.tolist() == [921, 400, 846, 413, 67, 801, 523, 573, 906, 270, 835, 268]
    assert not offsets.any()
    second, offsets = loader.sequences_at(np.arange(998, 1004))
    assert second.tolist() == [601, 435, 904, 770, 655, 480] and offsets.tolist() == [27] * 6


def test_prepare_repeats_golden_tokens(tmp_path):
    """GPT-2's ids of a known text after <|endoftext|>, as uint16."""
    prepare.main(prepare.PrepareConfig(input=[str(TEXT)], out=str(tmp_path / "out")))
    shard = np.load(tmp_path / "out" / "train_00000.npy")
    assert shard.dtype == np.uint16
    assert shard[:15].tolist() == [50256, 5962, 22307, 25, 198, 8421, 356, 5120,
                                   597, 2252, 11, 3285, 502, 2740, 13]
