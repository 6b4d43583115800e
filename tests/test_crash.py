"""Runs survive kills, signals and full disks with equal results; a diverged run saves nothing."""

import os
import re
import signal

import pytest

from gpt.signals import StopHandler
from tests.conftest import RUN, Fork, assert_same_results, assert_user_error, metrics, run


@pytest.fixture
def args(byte_data, tmp_path):
    """Return the flags of RUN in a new folder."""
    return ["--data_root", byte_data, "--log_dir", tmp_path, *RUN]


@pytest.mark.parametrize("place, name, status, last_saved", [
    ("step", "SIGKILL", -9, 4), ("save", "SIGKILL", -9, 4), ("evaluation", "SIGKILL", -9, 4),
    ("evaluation", "crash", 1, 4), ("step", "SIGTERM", 143, 7), ("save", "SIGINT", 130, 9),
    ("step", "SIGHUP", 129, 7)])
def test_resumed_run_repeats_every_number(args, tmp_path, uninterrupted_run, place, name, status,
                                          last_saved):
    """A kill or a crash loses the steps since the last save; on other signals the run finishes its
    step and saves."""
    done = Fork("tests/fault_injection.py", *args, FAULT=f"{place} {name}").result()
    assert done.returncode == status, done.stderr
    stopped = re.findall(r"stopped at step (\d+) of 12: rerun the same command to resume",
                         done.stdout)
    assert stopped == ([str(last_saved)] if status > 128 else [])
    again = run("-m", "scripts.train", *args)
    assert again.returncode == 0, again.stderr
    resumed = f"resuming from {tmp_path}/model_{last_saved:05d}.pt at step {last_saved} of 12\n"
    assert resumed in again.stdout
    assert_same_results(uninterrupted_run, tmp_path)


@pytest.mark.parametrize("max_steps, save_every", [("20", "12"), ("12", "0")])
def test_step_is_saved_before_its_evaluation(args, tmp_path, max_steps, save_every):
    """Where a save is due, and at the end: an evaluation that fails there costs nothing."""
    done = Fork("tests/fault_injection.py", *args, "--max_steps", max_steps, "--eval_every", "4",
                "--save_every", save_every, FAULT="evaluation crash").result()
    assert done.returncode == 1
    assert list(metrics(tmp_path, "val")) == [4, 8]
    assert (tmp_path / "model_00012.pt").exists() and (tmp_path / "optim_00012.pt").exists()


def test_second_signal_ends_the_run_except_under_torchrun(monkeypatch):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    for variables, later in (({}, signal.SIG_DFL), ({"TORCHELASTIC_RUN_ID": "1"}, signal.SIG_IGN)):
        monkeypatch.setattr(os, "environ", variables)
        stop = StopHandler(verbose=False)
        assert not stop.requested
        handlers[signal.SIGINT](signal.SIGINT, None)
        assert stop.requested and stop.signum == signal.SIGINT
        assert handlers[signal.SIGINT] == handlers[signal.SIGTERM] == later


def test_full_disk_keeps_saved_checkpoints(args, tmp_path, uninterrupted_run):
    """Full from step 6 on: warnings, and an error when the last save fails. With free space again
    the run completes."""
    full = Fork("tests/fault_injection.py", *args, FAULT="evaluation full_disk").result()
    assert re.findall(r"warning: (\S+( 8)?) is not saved \(.*File too large", full.stdout)[:2] == [
        ("model_best.pt", ""), ("step 8", " 8")]
    assert_user_error(full, "step 12 is not saved", "File too large", "free disk space")
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [
        "model_00000.pt", "model_00004.pt", "model_best.pt", "optim_00000.pt", "optim_00004.pt"]
    assert run("-m", "scripts.train", *args).returncode == 0
    assert_same_results(uninterrupted_run, tmp_path)


@pytest.mark.parametrize("flags, message", [
    (["--eval_every", "0"], "step 1: loss nan"),
    (["--max_steps", "1"], "step 1: the weights are infinite or NaN"),
    (["--eval_every", "1"], "step 1: validation loss nan")])
def test_diverged_run_stops_and_saves_nothing(args, tmp_path, flags, message):
    """The first update ruins the weights; whichever check fails first, the error has advice."""
    done = run("-m", "scripts.train", *args, "--max_lr", "1e18", "--warmup_steps", "0",
               "--grad_clip", "0", *flags)
    assert_user_error(done, message, "lower --max_lr", "last checkpoint")
    assert [path.name for path in tmp_path.glob("model_*.pt")] == ["model_00000.pt"]
    assert list(metrics(tmp_path, "train")) == [0]
    assert metrics(tmp_path, "val") == {}
