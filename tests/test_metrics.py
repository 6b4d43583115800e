"""gpt/metrics.py: every step is logged, and resumed runs know what was evaluated."""

import json
import sys
import tracemalloc
from types import SimpleNamespace

import pytest
import torch

from gpt.distributed import Ranks
from gpt.errors import UserError
from gpt.files import read_metrics
from gpt.metrics import RunLog


def start(folder, step=0):
    """Return the log of a run with 64 tokens per step and 96 per epoch, at `step`."""
    log = RunLog(folder, Ranks(0, 1, torch.device("cpu")), lambda: None, step, max_steps=4,
                 log_every=1, patience=0, warmup_steps=0, vocab_size=30, step_tokens=64,
                 epoch_tokens=96, peak_seconds=0.1)
    log.log_start({"seed": 1337}, torch="2.14")
    return log


def log_step(log, step):
    log.log_step(step, loss=1.5, lr=0.1, grad_norm=2.0, seconds=0.5)


def logged_steps(folder):
    return [record["step"] for record in read_metrics(folder / "metrics.jsonl")
            if record["split"] == "train"]


def test_run_continues_if_the_file_cannot_be_written(tmp_path, capsys):
    """With one warning. Later lines are intact, although a full disk left a part of a line."""
    log = start(tmp_path)
    log_step(log, 0)
    log.path.rename(tmp_path / "aside")
    log.path.mkdir()
    for step in (1, 2):
        log_step(log, step)
    log.path.rmdir()
    (tmp_path / "aside").rename(log.path)
    with open(log.path, "a") as file:
        file.write('{"step": 2, "spl')
    log_step(log, 3)
    assert logged_steps(tmp_path) == [0, 3]
    assert capsys.readouterr().out.count("warning: ") == 1


def test_step_derives_speed_and_epoch(tmp_path, capsys):
    """The third step has seen 192 tokens, two epochs; 64 tokens took half a second, five times as
    long as at the peak."""
    log_step(start(tmp_path), 2)
    record = read_metrics(tmp_path / "metrics.jsonl")[-1]
    assert (record["tokens"], record["tokens_per_s"], record["epoch"]) == (192, 128, 2)
    assert ("step 2 | loss: 1.5000 | lr: 0.100000 | dt: 500ms | grad norm: 2.00 | tokens/s: 128 | "
            "mfu: 20% | epoch: 2.00") in capsys.readouterr().out


def test_resumed_log_keeps_the_evaluations_of_its_model(tmp_path):
    """Resumed at step 2: later records are cut off, to be evaluated and logged again."""
    log = start(tmp_path)
    assert log.best_loss == float("inf") and not log.should_stop_early
    for step in range(4):
        log_step(log, step)
        log.log_validation(step + 1, loss=5.0 - step, bits_per_byte=None)
        log.log_samples(step + 1, [f"text {step} Ü\ufffd"])
    with open(log.path, "ab") as file:  # damage from a kill or worse
        file.write(b'\xff{"step": "x", "split": 3, "loss": []}\n[1]\n{"step": 1, "spl')
    again = start(tmp_path, step=2)
    records = [(record["step"], record["split"]) for record in read_metrics(again.path)]
    assert records == [(0, "start"), (0, "train"), (1, "val"), (1, "samples"), (1, "train"),
                       (2, "val"), (2, "samples"), (2, "start")]
    assert again.best_loss == 4.0
    for split in ("val", "samples"):
        due = [again.is_due(split, every=1, step=step, finished=False) for step in (0, 1, 2, 3)]
        assert due == [False, False, False, True]
    assert again.is_due("hellaswag", every=2, step=2, finished=False)
    assert again.is_due("hellaswag", every=2, step=3, finished=True)
    assert not again.is_due("hellaswag", every=2, step=3, finished=False)
    assert not again.is_due("hellaswag", every=0, step=3, finished=True)
    again.log_samples(3, ["\udce9 another text"])  # a byte that is not UTF-8
    samples = (tmp_path / "samples.txt").read_text()
    assert "text 1 Ü\ufffd" in samples and "another text" in samples and "text 2" not in samples


def test_last_line_without_line_break_stays_intact(tmp_path):
    """A full disk can cut a line just before its end."""
    log = start(tmp_path)
    log_step(log, 0)
    log.path.write_bytes(log.path.read_bytes().removesuffix(b"\n"))
    log_step(start(tmp_path, step=1), 1)
    assert logged_steps(tmp_path) == [0, 1]


def test_long_log_is_not_read_into_memory(tmp_path):
    record = {"step": 0, "split": "train", "loss": 1.5, "lr": 1e-3, "tokens": 64}
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(50_000):
            file.write(json.dumps(record | {"step": step}) + "\n")
    tracemalloc.start()
    try:
        start(tmp_path, step=50_000)
        assert tracemalloc.get_traced_memory()[1] < 3e6
    finally:
        tracemalloc.stop()


def test_failing_tracker_does_not_end_the_run(tmp_path, capsys):
    """One warning, and metrics.jsonl has every line."""
    log = start(tmp_path)
    log.open_trackers(None, {"seed": 1337})
    log.writer.add_scalar = None  # a call fails
    for step in range(3):
        log_step(log, step)
    log.close()
    failed = "warning: TensorBoard or Weights & Biases failed"
    assert capsys.readouterr().out.count(failed) == 1
    assert logged_steps(tmp_path) == [0, 1, 2]


def test_wandb_id_is_kept_until_the_run_restarts_from_step_0(tmp_path, monkeypatch):
    """The package itself is used in test_train_settings.py; a missing package is a UserError."""
    runs = []
    wandb = SimpleNamespace(init=lambda **args: runs.append(args), Error=Exception)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for first_step in (0, 2, 0):
        start(tmp_path, first_step).open_trackers("mine", {"seed": 1337})
    assert runs[0] == runs[1] and runs[2]["id"] != runs[0]["id"]
    assert runs[0]["project"] == "mine"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="needs wandb .*: pip install wandb"):
        start(tmp_path).open_trackers("mine", {"seed": 1337})
