"""Settings of scripts/train.py: automatic ones, early stopping, overfitting one batch."""

import contextlib
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt.checkpoint import Checkpoint
from gpt.config import GPTConfig
from gpt.distributed import Ranks
from gpt.model import GPT
from scripts.train import TrainConfig, load_data, resolve_auto, resolve_micro_batch_size
from tests.conftest import TINY_BYTES, metrics, run_ranks, save_shards, train

RANKS = Ranks(0, 1, torch.device("cpu"))
# The settings of a tiny model of bytes.
tiny_config = partial(TrainConfig, model=GPTConfig(0, 256, 1, 1, 8))


@pytest.mark.parametrize("settings, max_steps", [({"max_tokens": 1025}, 5),
                                                 ({"max_epochs": 0.1}, 13)])
def test_tokens_and_epochs_become_steps(byte_data, settings, max_steps):
    """0.1 epochs of 998 x 32 bytes are 12.5 steps. Resuming with config.yaml can then raise
    --max_steps."""
    config = tiny_config(str(byte_data), seq_len=32, micro_batch_size=4, total_batch_size=256,
                         **settings)
    config, *_ = load_data(config, RANKS)
    assert (config.max_steps, config.max_tokens, config.max_epochs) == (max_steps, 0, 0)


def test_automatic_settings_fit_the_data(tmp_path):
    """Here the 100 validation tokens, without a tokenizer for samples. A last shard may be too
    short for a sequence."""
    save_shards(tmp_path, np.zeros(705, np.uint8), 600, 605)
    config, _ = resolve_auto(tiny_config(str(tmp_path), seq_len="auto"), RANKS)
    assert config.seq_len == config.model.block_size == 64
    assert config.sample_every == 0


@pytest.mark.parametrize("old, expected", [(None, 12), (3, 3), (7, 12)])
def test_auto_micro_batch_size_is_kept_by_a_resumed_run(old, expected):
    """So that its losses stay equal, if it divides the 24 sequences of a step; else at most 16 on a
    CPU."""
    latest = old and Checkpoint(Path(), {"train_config": {"micro_batch_size": old}}, {})
    config = tiny_config(seq_len=32, total_batch_size=24 * 32)
    model = GPT(GPTConfig(32, 256, 1, 1, 8))
    config = resolve_micro_batch_size(config, model, contextlib.nullcontext(), RANKS, latest)
    assert config.micro_batch_size == expected


def test_patience_ends_a_run_without_improvement(uninterrupted_run, args, log_dir):
    """With a checkpoint and status 0, six validations after a low loss at step 2. A rerun on two
    ranks ends on both, although only rank 0 reads the log."""
    shutil.copytree(uninterrupted_run, log_dir)
    log = log_dir / "metrics.jsonl"
    log.write_text(re.sub(r'( 2, "split": "val", "loss":) [\d.]+', r"\1 0.5", log.read_text()))
    for ranks in (1, 2):
        done = run_ranks(ranks, "-m", "scripts.train", *args, "--max_steps", 30, "--patience", 6)
        assert [rank.returncode for rank in done] == [0] * ranks
        ended = "finished at step 14 of 30: no better loss than 0.5000 in 6 validations"
        assert ended in done[0].stdout
        assert (log_dir / "model_00014.pt").exists()


def test_overfit_one_batch_reaches_a_low_loss(byte_data, tmp_path):
    """On the 256 bytes of the first batch; on varied text this model's loss stays above 2."""
    flags = "--overfit_one_batch --max_steps 120 --max_lr 3e-2 --sample_every 0"
    train(byte_data, tmp_path, *TINY_BYTES, *flags.split())
    assert metrics(tmp_path, "train")[119]["loss"] < 0.5
