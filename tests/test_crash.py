"""Runs survive kills, signals and full disks with equal results; a diverged run saves nothing."""

import pytest

from gpt.files import load_pt
from tests.conftest import RUN, Fork, assert_same_results, assert_user_error, train


@pytest.mark.parametrize("fault, status, last_saved", [
    ("step SIGKILL", -9, 4), ("save SIGKILL", -9, 4), ("evaluation crash", 1, 4),
    ("step SIGINT SIGINT", -2, 4), ("save SIGTERM", 143, 9), ("step SIGHUP", 129, 7)])
def test_resumed_run_repeats_every_number(args, byte_data, log_dir, uninterrupted_run, fault,
                                          status, last_saved):
    """A kill, a crash or a second Ctrl-C loses the steps since the last save, which comes before
    the evaluation of its step. On a first signal the run finishes its step and saves."""
    done = Fork("tests/fault_injection.py", *args, FAULT=fault).result()
    assert done.returncode == status, done.stderr
    stopped = f"stopped at step {last_saved} of 12: rerun the same command to resume\n"
    assert (stopped in done.stdout) == (status > 128)
    again = train(byte_data, log_dir, *RUN)
    resumed = f"resuming from {log_dir}/model_{last_saved:05d}.pt at step {last_saved} of 12\n"
    assert resumed in again.stdout
    assert_same_results(uninterrupted_run, log_dir)


def test_full_disk_keeps_saved_checkpoints(args, byte_data, log_dir, uninterrupted_run):
    """Full from step 4 on: warnings, and an error when the last save fails. With free space again
    the run completes."""
    full = Fork("tests/fault_injection.py", *args, FAULT="evaluation full_disk").result()
    for name in ("model_best.pt", "step 8"):
        assert f"warning: {name} is not saved (File too large)" in full.stdout
    assert_user_error(full, "step 12 is not saved", "File too large", "free disk space")
    assert sorted(path.name for path in log_dir.glob("*.pt*")) == [
        "model_00000.pt", "model_00004.pt", "model_best.pt", "optim_00000.pt", "optim_00004.pt"]
    assert load_pt(log_dir / "model_best.pt")["step"] == 2
    train(byte_data, log_dir, *RUN)
    assert_same_results(uninterrupted_run, log_dir)


@pytest.mark.parametrize("flags, message", [
    ("--eval_every 0", "step 1: loss nan"),
    ("--eval_every 1", "step 1: validation loss nan"),
    ("--max_steps 1", "step 1: the weights are infinite or NaN")])
def test_diverged_run_stops_and_saves_nothing(byte_data, tmp_path, flags, message):
    """The first update ruins the weights; whichever check fails first, the error has advice."""
    flags += " --max_lr 1e18 --warmup_steps 0 --grad_clip 0"
    done = train(byte_data, tmp_path, *RUN, *flags.split(), status=2)
    assert_user_error(done, message, "lower --max_lr", "last checkpoint")
    assert [path.name for path in tmp_path.glob("model_*.pt")] == ["model_00000.pt"]
