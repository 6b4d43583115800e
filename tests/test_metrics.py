"""gpt/metrics.py: every step is logged, and resumed runs know what was evaluated."""

import os
import re
import sys
import termios
import tracemalloc

import pytest
import torch

from gpt.distributed import Ranks
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


def logged(folder):
    """Return (step, split) of each record."""
    return [(record["step"], record["split"]) for record in read_metrics(folder / "metrics.jsonl")]


def test_failing_log_does_not_end_the_run(tmp_path, capsys):
    """With one warning for metrics.jsonl and one for TensorBoard. Later lines are intact, although
    a full disk left a part of a line."""
    log = start(tmp_path)
    log.writer = "a tracker that fails"
    log.path.unlink()
    log.path.mkdir()
    for step in (0, 1):
        log_step(log, step)
    log.path.rmdir()
    log.path.write_text('{"step": 1, "spl')
    log_step(log, 2)
    assert logged(tmp_path) == [(2, "train")]
    assert capsys.readouterr().out.count("warning: ") == 2


def test_step_derives_speed_and_epoch(tmp_path, capsys):
    """The third step has seen 192 tokens, two epochs; 64 tokens took half a second, five times as
    long as at the peak."""
    log_step(start(tmp_path), 2)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["tokens"] == 192
    assert ("step 2 | loss: 1.5000 | lr: 0.100000 | dt: 500ms | grad norm: 2.00 | tokens/s: 128 | "
            "mfu: 20% | epoch: 2.00") in capsys.readouterr().out


def test_resumed_log_keeps_the_evaluations_of_its_model(tmp_path):
    """Resumed at step 2: later records are cut off, to be evaluated and logged again. So are
    damaged lines, from a kill or worse."""
    log = start(tmp_path)
    for step in range(4):
        log_step(log, step)
        log.log_validation(step + 1, loss=5.0 - step, bits_per_byte=None)
        log.log_samples(step + 1, ["text"])
    with open(log.path, "ab") as file:
        file.write(b'\xff{"step": "x", "split": 3, "loss": []}\n[1]\n{"step": 1, "spl')
    again = start(tmp_path, step=2)
    assert logged(tmp_path) == [
        (0, "start"), (0, "train"), (1, "val"), (1, "samples"), (1, "train"), (2, "val"),
        (2, "samples"), (2, "start")]
    assert again.best_loss == 4.0
    again.log_samples(3, ["another text"])
    samples = (tmp_path / "samples.txt").read_text()
    assert re.findall(r"step (\d)", samples) == ["1", "2", "3"]


def test_long_log_is_not_read_into_memory(tmp_path):
    """Its last line, which a full disk has cut just before its end, stays intact."""
    line = '{"step": 1, "split": "train", "loss": 1.5}'
    (tmp_path / "metrics.jsonl").write_text("\n".join([line] * 50_000))
    tracemalloc.start()
    start(tmp_path, step=2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6
    assert len(logged(tmp_path)) == 50_001


@pytest.mark.parametrize("columns", [0, 120])
def test_terminal_shows_a_bar_or_lines_if_it_has_no_size(tmp_path, monkeypatch, columns):
    terminal, program_side = os.openpty()
    termios.tcsetwinsize(program_side, (40, columns))
    with open(program_side, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        log = start(tmp_path, step=3)
        log_step(log, 3)
        log.close()
        stream.write("end")
    printed = ""
    while not printed.endswith("end"):
        printed += os.read(terminal, 1000).decode()
    assert ("4/4" in printed) == (columns > 0)
    assert ("step 3 |" in printed) == (columns == 0)
