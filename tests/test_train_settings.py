"""scripts/train.py, as typed: how long to train, what is kept of it, and where else it is shown."""

import math
import re
import subprocess

import pytest
import yaml

from gpt import checkpoint
from tests.conftest import ROOT, TINY, assert_refused, command, environment, metrics, run, run_ranks, train


def test_patience_ends_a_run_that_gets_no_better(byte_data, tmp_path):
    """With a checkpoint, status 0, and the same words when it is started again; killed in between it ends there too."""
    words = ["--model.vocab_size", "256", "--eval_every", "2", "--sample_every", "0", "--max_lr", "3", "--grad_clip",
             "0", "--warmup_steps", "0", "--min_lr_ratio", "1", "--max_steps", "60", "--patience", "3"]
    done = train(byte_data, tmp_path / "log", *words)
    losses = [record["loss"] for record in metrics(tmp_path / "log", "val").values()]
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 3 and 2 * len(losses) < 60
    ended = f"finished at step {2 * len(losses)} of 60: no better loss than {min(losses):.4f} in 3 validations"
    assert ended in done.stdout
    assert checkpoint.load_checkpoint(tmp_path / "log" / f"model_{2 * len(losses):05}.pt")["step"] == 2 * len(losses)
    assert checkpoint.load_checkpoint(tmp_path / "log" / "model_best.pt")["step"] == 2 * best + 2
    assert ended in train(byte_data, tmp_path / "log", *words).stdout
    # In two parts: what came before the break counts.
    train(byte_data, tmp_path / "parts", *words[:-4], "--max_steps", str(2 * len(losses) - 4), "--patience", "3")
    assert ended in train(byte_data, tmp_path / "parts", *words).stdout
    assert list(metrics(tmp_path / "parts", "val")) == list(metrics(tmp_path / "log", "val"))
    # Two ranks end at one step, though only rank 0 reads the log.
    for done in run_ranks(2, "-m", "scripts.train", "--data_root", byte_data, "--log_dir", tmp_path / "parts", *TINY,
                          *words):
        assert done.returncode == 0, done.stderr


def test_how_long_to_train_in_tokens_and_in_epochs(byte_data, tmp_path):
    """20,000 and 12,000 bytes are 624 + 374 windows of 32: 998 * 32 tokens an epoch, 256 in a step."""
    words = ["--model.vocab_size", "256", "--eval_every", "0", "--sample_every", "0"]
    train(byte_data, tmp_path / "tokens", *words, "--max_tokens", "1025")
    assert list(metrics(tmp_path / "tokens", "train")) == [0, 1, 2, 3, 4]
    done = train(byte_data, tmp_path / "epochs", *words, "--max_epochs", "0.1")
    assert max(metrics(tmp_path / "epochs", "train")) + 1 == math.ceil(0.1 * 998 * 32 / 256)
    assert metrics(tmp_path / "epochs", "train")[12]["epoch"] == pytest.approx(13 * 256 / (998 * 32), abs=1e-4)
    assert " | epoch: 0.10" in done.stdout
    written = yaml.safe_load((tmp_path / "epochs" / "config.yaml").read_text())
    assert (written["max_steps"], written["max_epochs"]) == (13, 0)  # --config config.yaml --max_steps 20 goes on


def test_overfit_one_batch_learns_the_first_batch_by_heart(byte_data, tmp_path):
    """Its 256 bytes, which 16 dimensions can hold; without it the loss stays that of English."""
    words = ["--model.vocab_size", "256", "--eval_every", "5", "--sample_every", "0", "--max_steps", "150", "--max_lr",
             "3e-2"]
    train(byte_data, tmp_path / "all", *words)
    train(byte_data, tmp_path / "one", *words, "--overfit_one_batch", "true")
    every, one = (metrics(tmp_path / name, "train") for name in ("all", "one"))
    assert one[0]["loss"] == every[0]["loss"]
    assert one[149]["loss"] < 0.3 < 2 < every[149]["loss"]
    assert not metrics(tmp_path / "one", "val")
    assert_refused(run("-m", "scripts.train", "--data_root", byte_data, "--log_dir", tmp_path / "all", *TINY, *words,
                       "--overfit_one_batch", "true", "--max_steps", "200"),
                   "a run with --overfit_one_batch False", "--log_dir")


def test_samples_are_kept_once(data_root, tmp_path):
    """Every prompt at every sample_every steps, in the order of the steps, also after a kill: as on the console."""
    words = ["--eval_every", "0", "--sample_every", "2", "--sample_prompts", "ROMEO:", "JULIET:"]
    done = train(data_root, tmp_path, *words, "--max_steps", "5")
    kept = (tmp_path / "samples.txt").read_text()
    assert re.findall(r"^--- sample at step (\d) ---\n(\w+:)", kept, re.MULTILINE) == [
        (step, name) for step in "245" for name in ("ROMEO:", "JULIET:")]
    assert all(text in done.stdout for text in re.findall(r"--- sample .*?\n---\n", kept, re.DOTALL))
    for path in tmp_path.glob("*_00005.pt"):
        path.unlink()
    for path in tmp_path.glob("optim_*.pt"):  # as if it had been killed on its way to step 5
        assert path.name == "optim_00000.pt"
    train(data_root, tmp_path, *words, "--max_steps", "5")
    assert (tmp_path / "samples.txt").read_text() == kept


def test_tensorboard_has_every_scalar_and_the_texts(data_root, tmp_path):
    """Read back with TensorBoard's own reader; a run that goes on adds to it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = ["--tensorboard", "true", "--eval_every", "2", "--sample_every", "2"]
    train(data_root, tmp_path, *words, "--max_steps", "2")
    train(data_root, tmp_path, *words, "--max_steps", "4")
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    for split in ("train", "val"):
        for step, record in metrics(tmp_path, split).items():
            for name in record.keys() - {"step", "split"}:
                values = {event.step: event.value for event in board.Scalars(f"{split}/{name}")}
                assert values[step] == pytest.approx(record[name], rel=1e-6), (split, name)
    assert {"samples/text_summary", "settings/text_summary"} <= set(board.Tags()["tensors"])


def test_weights_and_biases_goes_on_with_the_same_run(data_root, tmp_path, monkeypatch):
    """Offline, with the real package; one that is not installed is one clear line."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = ["--wandb_project", "tests", "--eval_every", "2", "--sample_every", "2"]
    for max_steps in ("2", "4"):
        train(data_root, tmp_path / "log", *words, "--max_steps", max_steps)
    name = (tmp_path / "log" / "wandb_run.txt").read_text()
    runs = list((tmp_path / "log" / "wandb").glob(f"offline-run-*-{name}"))
    assert len(runs) == 2 and all(any(run.glob("*.wandb")) for run in runs)
    for path in (tmp_path / "log").glob("*.pt"):
        path.unlink()
    train(data_root, tmp_path / "log", *words, "--max_steps", "1")  # a new run in the old folder is a new one there
    assert (tmp_path / "log" / "wandb_run.txt").read_text() != name
    (tmp_path / "wandb.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = subprocess.run(command("-m", "scripts.train", "--data_root", str(data_root), "--log_dir",
                                  str(tmp_path / "other"), *TINY, *words), cwd=ROOT, env=environment(),
                          capture_output=True, text=True)
    assert_refused(done, "wandb is not installed", "pip install wandb")


@pytest.mark.slow
def test_two_compiled_ranks_train_as_one_plain_process(data_root, tmp_path):
    """DistributedDataParallel around torch.compile, in bf16: rounding apart, the same losses."""
    words = ["--max_steps", "3", "--eval_every", "0", "--sample_every", "0", "--precision", "bf16",
             "--micro_batch_size", "2"]
    train(data_root, tmp_path / "one", *words)
    for done in run_ranks(2, "-m", "scripts.train", "--data_root", data_root, "--log_dir", tmp_path / "two", *TINY,
                          *words, "--compile", "true"):
        assert done.returncode == 0, done.stderr
    one, two = (metrics(tmp_path / name, "train") for name in ("one", "two"))
    for step in range(3):
        assert two[step]["loss"] == pytest.approx(one[step]["loss"], abs=1e-2)
