"""gpt/metrics.py: every step is logged, even after failed writes, and resumed runs know what was evaluated."""

import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gpt.config import GPTConfig
from gpt.dataloader import DataLoaderLite
from gpt.distributed import Distributed
from gpt.errors import UserError
from gpt.files import read_metrics
from gpt.metrics import RunLog, import_or_error
from gpt.model import GPT
from scripts.train import TrainConfig


def start(folder: Path, step: int = 0, **settings) -> RunLog:
    """Return the log of a run with 64 tokens per step and 96 per epoch, at `step`."""
    np.save(folder / "train_00000.npy", np.zeros(100, dtype=np.uint16))
    loader = DataLoaderLite(folder, "train", micro_batch_size=4, seq_len=16, vocab_size=30, total_batch_size=64)
    config = replace(TrainConfig(log_dir=str(folder), seq_len=16, micro_batch_size=4, total_batch_size=64, max_steps=4,
                                 precision="float32", compile=False), **settings)
    log = RunLog(config, Distributed(0, 1, torch.device("cpu")))
    log.start(step, config, {"seed": 1337}, GPT(GPTConfig(16, 30, 1, 1, 8)), loader)
    return log


def step(log, number):
    log.step(step=number, loss=1.5, lr=0.1, grad_norm=2.0, seconds=0.5)


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_step_is_appended_later_if_the_file_cannot_be_written(tmp_path, capsys):
    """Once and in order, without the partial line that a full disk left; with one warning."""
    log = start(tmp_path)
    step(log, 0)
    log.path.rename(tmp_path / "aside")
    log.path.mkdir()
    for number in (1, 2):
        step(log, number)
    log.path.rmdir()
    (tmp_path / "aside").rename(log.path)
    with open(log.path, "a") as file:
        file.write('{"step": 1, "spl')
    step(log, 3)
    assert steps_in(log.path) == [0, 1, 2, 3]
    assert capsys.readouterr().out.count("warning: ") == 1


def test_step_derives_speed_and_epoch(tmp_path, capsys):
    """The third step has seen 192 tokens, two epochs; 64 tokens took half a second."""
    log = start(tmp_path)
    step(log, 2)
    record = read_metrics(log.path)[0]
    assert (record["tokens"], record["tokens_per_s"], record["epoch"]) == (192, 128, 2)
    assert ("step 2 | loss: 1.5000 | lr: 0.100000 | dt: 500ms | grad norm: 2.00 | tokens/s: 128 | mfu: 0% | epoch: 2.00"
            in capsys.readouterr().out)


def test_terminal_shows_a_progress_bar_instead_of_step_lines(tmp_path, monkeypatch):
    """With loss, speed and time left; validation results are printed above it."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    log = start(tmp_path)
    log.validation(step=0, loss=2.0, bits_per_byte=None)
    for number in range(4):
        step(log, number)
    log.close()
    shown = terminal.getvalue()
    assert re.search(r"4/4 \[.*, loss 1\.5000, val 2\.0000, 128 tokens/s, 0% MFU\]", shown)
    assert "\rval loss 2.0000 | step: 0 | perplexity: 7.4\n" in shown and "step 1 |" not in shown


def test_resumed_log_keeps_the_evaluations_of_its_model(tmp_path):
    """Resumed at step 2: later records are removed, to be evaluated and logged again."""
    log = start(tmp_path)
    assert log.best_loss == float("inf") and not log.out_of_patience
    for number in range(4):
        step(log, number)
        log.validation(step=number + 1, loss=5.0 - number, bits_per_byte=None)
        log.samples(step=number + 1, texts=[f"text {number} Ü\ufffd"])
    with open(log.path, "ab") as file:
        file.write(b'\xff{"step": "x", "split": 3, "loss": []}\n[1]\n{"step": 1, "spl')  # damage from a kill or worse
    again = start(tmp_path, step=2)
    assert [(record["step"], record["split"]) for record in read_metrics(again.path)] == [
        (0, "train"), (1, "val"), (1, "train"), (2, "val")]
    samples = again.samples_path.read_text()
    assert again.best_loss == 4.0 and "text 1 Ü\ufffd" in samples and "text 2" not in samples
    for split in ("val", "samples"):
        assert again.has(split, 2) and not again.has(split, 3)
    assert not again.has("hellaswag", 2)


def test_failing_tracker_does_not_end_the_run(tmp_path, capsys):
    """One warning, and metrics.jsonl has every line."""
    log = start(tmp_path, tensorboard=True)
    log.writer.add_scalar = None  # a call fails
    for number in range(3):
        step(log, number)
    log.close()
    assert capsys.readouterr().out.count("warning: TensorBoard or Weights & Biases failed") == 1
    assert steps_in(log.path) == [0, 1, 2]


def test_wandb_id_is_kept_until_the_run_restarts_from_step_0(tmp_path, monkeypatch):
    """The package itself is used in test_train_settings.py; a missing package is a UserError."""
    runs = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **args: runs.append(args), Error=Exception))
    for first_step in (0, 2, 0):
        start(tmp_path, first_step, wandb_project="mine")
    assert runs[0] == runs[1] and runs[2]["id"] != runs[0]["id"] and runs[0]["project"] == "mine"
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="wandb is not installed .*: pip install wandb"):
        import_or_error("wandb", "wandb")
