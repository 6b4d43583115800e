"""gpt/metrics.py: a line for every step, whatever happens to the file; and the memory of what was evaluated."""

import errno
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt.config import GPTConfig
from gpt.dataloader import DataLoaderLite
from gpt.distributed import Distributed
from gpt.files import read_metrics
from gpt.metrics import RunLog
from gpt.model import GPT


@dataclass
class Config:
    """The settings that a log reads."""

    log_dir: str = ""
    total_batch_size: int = 64
    micro_batch_size: int = 4
    seq_len: int = 16
    max_steps: int = 10
    warmup_steps: int = 0
    patience: int = 2
    log_every: int = 1
    precision: str = "float32"
    compile: bool = False
    tensorboard: bool = False
    wandb_project: str | None = None


def start(folder: Path, step: int = 0, **settings) -> RunLog:
    np.save(folder / "train_00000.npy", np.zeros(100, dtype=np.uint16))
    loader = DataLoaderLite(folder, "train", micro_batch_size=4, seq_len=16, vocab_size=30, total_batch_size=64)
    config = replace(Config(), log_dir=str(folder), **settings)
    log = RunLog(config, Distributed(0, 1, torch.device("cpu")))
    log.start(step, config, {}, GPT(GPTConfig(16, 30, 1, 1, 8)), loader)
    return log


def step(log, number):
    log.step(step=number, loss=1.5, lr=0.1, grad_norm=2.0, seconds=0.5)


def test_lines_survive_a_folder_that_cannot_be_written(tmp_path, capsys):
    """Steps logged while the file could not be written are appended later, once and in order."""
    log = start(tmp_path)
    step(log, 0)
    log.path.rename(tmp_path / "aside")
    log.path.mkdir()
    for number in (1, 2, 3):
        step(log, number)
    log.path.rmdir()
    (tmp_path / "aside").rename(log.path)
    with open(log.path, "a") as file:
        file.write('{"step": 1, "spl')  # as much of a line as a full disk took
    step(log, 4)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [0, 1, 2, 3, 4]
    assert capsys.readouterr().out.count("warning: ") == 1
    assert [record["step"] for record in read_metrics(log.path)] == [0, 1, 2, 3, 4]


def test_a_deleted_file_begins_again(tmp_path):
    """With the next line, not with as many zeros as there were letters."""
    log = start(tmp_path)
    step(log, 0)
    log.path.unlink()
    step(log, 1)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1]


def test_step_derives_speed_and_epoch(tmp_path, capsys):
    """64 tokens in half a second, of an epoch of 6 sequences of 16."""
    log = start(tmp_path)
    step(log, 2)
    record = read_metrics(log.path)[0]
    assert (record["tokens"], record["tokens_per_s"], record["epoch"]) == (192, 128, 2)
    assert ("step 2 | loss: 1.5000 | lr: 0.100000 | dt: 500ms | grad norm: 2.00 | tokens/s: 128 | mfu: 0% | epoch: 2.00"
            in capsys.readouterr().out)


def test_a_resumed_log_remembers_evaluations_and_drops_later_lines(tmp_path):
    """Resumed at step 2: the validation of that model stays, what came after its checkpoint is logged again."""
    log = start(tmp_path)
    assert log.best_loss == float("inf") and not log.out_of_patience
    for number in range(4):
        step(log, number)
        log.validation(step=number + 1, loss=5.0 - number, bits_per_byte=None)
        log.samples(step=number + 1, texts=[f"text {number}"])
    again = start(tmp_path, step=2)
    kept = [(record["step"], record["split"]) for record in read_metrics(again.path)]
    assert kept == [(0, "train"), (1, "val"), (1, "train"), (2, "val")]
    assert again.best_loss == 4.0 and "text 1" in again.samples_path.read_text()
    assert "text 2" not in again.samples_path.read_text()
    for split in ("val", "samples"):
        assert again.has(split, 2) and not again.has(split, 3)
    assert not again.has("hellaswag", 2)


@pytest.mark.parametrize("losses, patience, out", [
    ([3, 2, 2.5, 2.4], 2, True), ([3, 2, 2.5], 2, False), ([3, 2, 2.5, 1.9], 2, False), ([3, 4, 5, 6], 0, False)])
def test_patience_counts_validations_without_a_new_best(tmp_path, losses, patience, out):
    log = start(tmp_path, patience=patience)
    for number, loss in enumerate(losses):
        log.validation(step=number, loss=loss, bits_per_byte=None)
    assert log.out_of_patience is out


def test_a_failing_tracker_does_not_end_the_run(tmp_path, capsys):
    """One warning, and metrics.jsonl has every line; samples in any language survive a resume."""
    log = start(tmp_path, tensorboard=True)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    log.writer.add_scalar = full
    for number in range(3):
        step(log, number)
    log.samples(step=3, texts=["Ü\ufffd"])
    log.close()
    assert capsys.readouterr().out.count("warning: TensorBoard or Weights & Biases failed") == 1
    assert len(read_metrics(log.path)) == 3
    before = log.samples_path.read_bytes()
    start(tmp_path, step=3)
    assert log.samples_path.read_bytes() == before
