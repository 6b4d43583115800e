"""Settings of scripts/train.py: automatic ones, early stopping, overfitting one batch."""

import re
import shutil

import numpy as np

from gpt.files import load_pt
from tests.conftest import TINY_BYTES, metrics, run_ranks, save_shards, train


def test_automatic_settings_fit_the_data_and_stay(tmp_path, log_dir):
    """seq_len is the longest of 32, 64, 128 and 256 below the 100 tokens of the val split. Tokens
    and epochs become steps: 1,537 tokens are two, 8.1 epochs four. The micro-batch of a resumed run
    does not change, so that its losses stay equal."""
    save_shards(tmp_path, np.zeros(705, np.uint8), 600, 605)
    flags = "--seq_len auto --total_batch_size 1536 --sample_every 1"
    changes = ["--micro_batch_size 3 --max_tokens 1537", "--micro_batch_size auto --max_epochs 8.1"]
    for max_steps, change in zip((2, 4), changes, strict=True):
        train(tmp_path, log_dir, *TINY_BYTES, *flags.split(), *change.split())
        config = load_pt(log_dir / f"model_0000{max_steps}.pt")["train_config"]
        assert config["seq_len"] == 64 and config["micro_batch_size"] == 3
        assert config["max_steps"] == max_steps
        assert not config["max_tokens"] and not config["max_epochs"]


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
    flags = "--overfit_one_batch --max_steps 120 --max_lr 3e-2"
    train(byte_data, tmp_path, *TINY_BYTES, *flags.split())
    assert metrics(tmp_path, "train")[119]["loss"] < 0.5


def test_dropout_differs_in_every_step(byte_data, tmp_path):
    """Here nothing else does."""
    flags = "--overfit_one_batch --max_lr 0 --model.dropout 0.5 --max_steps 3"
    train(byte_data, tmp_path, *TINY_BYTES, *flags.split())
    assert len({record["loss"] for record in metrics(tmp_path, "train").values()}) == 3
