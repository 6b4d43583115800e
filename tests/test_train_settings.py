"""Settings of scripts/train.py: automatic ones, early stopping, overfitting one batch, trackers."""

from functools import partial

import pytest
import torch

from gpt.checkpoint import load_checkpoint
from gpt.config import GPTConfig
from gpt.device import select_precision
from gpt.distributed import Ranks
from scripts.train import TrainConfig, init_model, load_data, resolve_auto
from tests.conftest import (
    RUN,
    TINY_BYTES,
    assert_same_results,
    metrics,
    run_ranks,
    save_shards,
    train,
)

RANKS = Ranks(0, 1, torch.device("cpu"))
# The settings of a tiny model of bytes.
tiny_config = partial(TrainConfig, model=GPTConfig(0, 256, 1, 1, 8))


@pytest.mark.parametrize("settings, max_steps", [
    ({"max_tokens": 1025}, 5), ({"max_epochs": 0.1}, 13), ({"max_steps": 7}, 7)])
def test_tokens_and_epochs_become_steps(byte_data, settings, max_steps):
    """0.1 epochs of 998 x 32 bytes are 12.5 steps. Resuming with config.yaml can then raise
    --max_steps."""
    config = tiny_config(str(byte_data), seq_len=32, micro_batch_size=4, total_batch_size=256,
                         **settings)
    config = load_data(config, RANKS)[0]
    assert (config.max_steps, config.max_tokens, config.max_epochs) == (max_steps, 0, 0)


def test_all_automatic_settings_are_replaced(tmp_path):
    """The sequence length fits the 100 validation tokens; a last shard too short for a sequence is
    skipped."""
    save_shards(tmp_path, torch.arange(705).remainder(50).numpy(), 600, 605)
    config, tokenizer = resolve_auto(tiny_config(str(tmp_path), seq_len="auto", micro_batch_size=1,
                                                 total_batch_size=64), RANKS)
    model = init_model(config, tokenizer, latest=None)
    _, train_loader, val_loader, _ = load_data(config, RANKS)
    assert config.seq_len == config.model.block_size == model.config.block_size == 64
    assert (train_loader.n_sequences, val_loader.n_sequences) == (9, 1)
    assert len(train_loader.shards) == 2
    assert config.precision == select_precision("auto", RANKS.device) and config.compile is False
    assert tokenizer is None and config.sample_every == 0


def test_auto_micro_batch_size_is_kept_by_a_resumed_run(byte_data, tmp_path):
    """On a CPU at most 16 of the 24 sequences of a step. A run that was started with other
    micro-batches keeps them, so that its losses stay equal."""
    args = [*TINY_BYTES, "--total_batch_size", 24 * 32, "--eval_every", "0"]
    new = train(byte_data, tmp_path / "new", *args, "--micro_batch_size", "auto", "--max_steps", 1)
    assert "a step is 2 x 12 x 32 tokens" in new.stdout
    train(byte_data, tmp_path / "old", *args, "--micro_batch_size", 3, "--max_steps", 1)
    resumed = train(byte_data, tmp_path / "old", *args, "--micro_batch_size", "auto",
                    "--max_steps", 2)
    assert "a step is 8 x 3 x 32 tokens" in resumed.stdout
    assert "changed: max_steps 1 -> 2\n" in resumed.stdout


def test_deterministic_changes_nothing_on_a_cpu(byte_data, tmp_path, uninterrupted_run):
    train(byte_data, tmp_path, *RUN, "--deterministic", "true")
    assert_same_results(uninterrupted_run, tmp_path)


def test_patience_ends_a_run_without_improvement(byte_data, tmp_path):
    """With a checkpoint and status 0. A rerun on two ranks ends on both, although only rank 0 reads
    the log."""
    args = [*TINY_BYTES, "--eval_every", "2", "--sample_every", "0", "--max_lr", "3", "--grad_clip",
            "0", "--warmup_steps", "0", "--min_lr_ratio", "1", "--max_steps", "60", "--patience",
            "3"]
    done = train(byte_data, tmp_path, *args)
    losses = [record["loss"] for record in metrics(tmp_path, "val").values()]
    best, last_step = min(losses), 2 * len(losses)
    assert losses.index(best) == len(losses) - 1 - 3 and last_step < 60
    ended = f"finished at step {last_step} of 60: no better loss than {best:.4f} in 3 validations"
    assert ended in done.stdout
    assert load_checkpoint(tmp_path / "model_best.pt")["val_loss"] == best
    again = run_ranks(2, "-m", "scripts.train", "--data_root", byte_data, "--log_dir", tmp_path,
                      *args)
    assert [rank.returncode for rank in again] == [0, 0] and ended in again[0].stdout


def test_overfit_one_batch_reaches_a_low_loss(byte_data, tmp_path):
    """On the 256 bytes of the first batch, without validation and so without early stopping; on
    varied text this model's loss stays above 2."""
    train(byte_data, tmp_path, *TINY_BYTES, "--eval_every", "5", "--patience", "2",
          "--sample_every", "0", "--max_steps", "120", "--max_lr", "3e-2",
          "--overfit_one_batch", "true")
    assert metrics(tmp_path, "train")[119]["loss"] < 0.5 and not metrics(tmp_path, "val")


def test_trackers_log_every_scalar(data_root, tmp_path, monkeypatch):
    """TensorBoard files, read with TensorBoard's reader, and an offline Weights & Biases run, which
    copies them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    train(data_root, tmp_path, "--wandb_project", "tests", "--tensorboard", "true", "--max_steps",
          "2", "--eval_every", "2", "--sample_every", "2")
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    run_id = (tmp_path / "wandb_run.txt").read_text()
    offline_run, = (tmp_path / "wandb").glob(f"offline-run-*-{run_id}/*.wandb")
    for split, step in (("train", 0), ("train", 1), ("val", 2)):
        for name, value in metrics(tmp_path, split)[step].items():
            if name not in ("step", "split"):
                event, = (event for event in board.Scalars(f"{split}/{name}")
                          if event.step == step)
                assert event.value == pytest.approx(value, rel=1e-6), (split, name)
                assert f"{split}/{name}".encode() in offline_run.read_bytes()
    assert {"samples/text_summary", "settings/text_summary"} <= set(board.Tags()["tensors"])
