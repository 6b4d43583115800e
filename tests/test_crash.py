"""Runs survive kills, signals and full disks with equal results; a diverged run saves nothing."""

import signal

import pytest

from gpt.signals import StopHandler
from tests.conftest import RUN, Fork, assert_same_results, assert_user_error, run, train


@pytest.fixture
def args(byte_data, tmp_path):
    """Return the flags of RUN in a new folder."""
    return ["--data_root", byte_data, "--log_dir", tmp_path, *RUN]


@pytest.mark.parametrize("fault, status, last_saved", [
    ("step SIGKILL", -9, 4), ("save SIGKILL", -9, 4), ("evaluation crash", 1, 4),
    ("save SIGTERM", 143, 9), ("step SIGHUP", 129, 7)])
def test_resumed_run_repeats_every_number(args, byte_data, tmp_path, uninterrupted_run, fault,
                                          status, last_saved):
    """A kill or a crash loses the steps since the last save, which comes before the evaluation of
    its step. On other signals the run finishes its step and saves."""
    done = Fork("tests/fault_injection.py", *args, FAULT=fault).result()
    assert done.returncode == status, done.stderr
    stopped = f"stopped at step {last_saved} of 12: rerun the same command to resume\n"
    assert (stopped in done.stdout) == (status > 128)
    again = train(byte_data, tmp_path, *RUN)
    resumed = f"resuming from {tmp_path}/model_{last_saved:05d}.pt at step {last_saved} of 12\n"
    assert resumed in again.stdout
    assert_same_results(uninterrupted_run, tmp_path)


@pytest.mark.parametrize("variable, second", [
    ("ANY_OTHER", signal.SIG_DFL), ("TORCHELASTIC_RUN_ID", signal.SIG_IGN)])
def test_second_signal_ends_the_run_except_under_torchrun(monkeypatch, variable, second):
    """A worker of torchrun can get the same signal twice."""
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setenv(variable, "1")
    stop = StopHandler(verbose=False)
    handlers[signal.SIGINT](signal.SIGINT, None)
    assert stop.requested
    assert handlers[signal.SIGINT] == handlers[signal.SIGTERM] == second


def test_full_disk_keeps_saved_checkpoints(args, byte_data, tmp_path, uninterrupted_run):
    """Full from step 4 on: warnings, and an error when the last save fails. With free space again
    the run completes."""
    full = Fork("tests/fault_injection.py", *args, FAULT="evaluation full_disk").result()
    for name in ("model_best.pt", "step 8"):
        assert f"warning: {name} is not saved (File too large)" in full.stdout
    assert_user_error(full, "step 12 is not saved", "File too large", "free disk space")
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [
        "model_00000.pt", "model_00004.pt", "model_best.pt", "optim_00000.pt", "optim_00004.pt"]
    train(byte_data, tmp_path, *RUN)
    assert_same_results(uninterrupted_run, tmp_path)


@pytest.mark.parametrize("flags, message", [
    (["--eval_every", 0], "step 1: loss nan"),
    (["--eval_every", 1], "step 1: validation loss nan"),
    (["--max_steps", 1], "step 1: the weights are infinite or NaN")])
def test_diverged_run_stops_and_saves_nothing(args, tmp_path, flags, message):
    """The first update ruins the weights; whichever check fails first, the error has advice."""
    done = run("-m", "scripts.train", *args, "--max_lr", "1e18", "--warmup_steps", 0,
               "--grad_clip", 0, *flags)
    assert_user_error(done, message, "lower --max_lr", "last checkpoint")
    assert [path.name for path in tmp_path.glob("model_*.pt")] == ["model_00000.pt"]
