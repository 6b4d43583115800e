"""Runs survive kills, signals, failed evaluations and full disks with equal results; run lock, out of memory, NaN."""

import os
import re
import resource
import signal
import sys

import pytest

from gpt.files import run_lock
from gpt.signals import StopHandler
from tests.conftest import RUN, TINY_BYTES, Fork, assert_same_results, assert_user_error, metrics, run


@pytest.fixture
def args(byte_data, tmp_path):
    """Return the flags of RUN in a new folder."""
    return ["--data_root", byte_data, "--log_dir", tmp_path, *RUN]


@pytest.mark.parametrize("place, name, status, last_saved", [
    ("step", "SIGKILL", -9, 4), ("save", "SIGKILL", -9, 4), ("evaluation", "SIGKILL", -9, 4),
    ("step", "SIGTERM", 143, 7), ("evaluation", "SIGTERM", 143, 7), ("save", "SIGINT", 130, 9),
    ("step", "SIGHUP", 129, 7)])
def test_resumed_run_repeats_every_number(args, tmp_path, uninterrupted_run, place, name, status, last_saved):
    """SIGKILL loses the steps since the last save; on other signals the run finishes its step and saves."""
    done = Fork("tests/fault_injection.py", *args, FAULT=f"{place} {name}").result()
    assert done.returncode == status and not done.stderr, done.stderr
    stopped = re.findall(r"stopped at step (\d+) of 12: rerun the same command to resume", done.stdout)
    assert stopped == ([] if name == "SIGKILL" else [str(last_saved)])
    again = run("-m", "scripts.train", *args)
    assert again.returncode == 0, again.stderr
    assert f"resuming from {tmp_path}/model_{last_saved:05d}.pt at step {last_saved} of 12\n" in again.stdout
    assert_same_results(uninterrupted_run, tmp_path)


def test_failed_evaluation_loses_no_step(args, tmp_path, uninterrupted_run):
    """The run resumes from that very step, although no save was due, and evaluates it then."""
    failed = Fork("tests/fault_injection.py", *args, FAULT="evaluation crash").result()
    assert failed.returncode == 1 and "RuntimeError: injected" in failed.stderr
    assert list(metrics(tmp_path, "train")) == list(range(6)) and list(metrics(tmp_path, "val")) == [2, 4]
    again = run("-m", "scripts.train", *args)
    assert f"resuming from {tmp_path}/model_00006.pt at step 6 of 12\n" in again.stdout, again.stderr
    assert_same_results(uninterrupted_run, tmp_path)


def test_stop_handler_exits_or_stores_the_signal(monkeypatch, capfd):
    """The first signal exits before the first step and is stored after it; the second kills, except under torchrun."""
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    with pytest.raises(SystemExit, match="143"):
        StopHandler(verbose=True)(signal.SIGTERM, None)
    assert "SIGTERM: stopping before the first completed step" in capfd.readouterr().out
    for variables, later in (({}, signal.SIG_DFL), ({"TORCHELASTIC_RUN_ID": "1"}, signal.SIG_IGN)):
        monkeypatch.setattr(os, "environ", variables)
        stop = StopHandler(verbose=False)
        stop.has_unsaved_steps = True
        handlers[signal.SIGINT](signal.SIGINT, None)
        assert stop.signum == signal.SIGINT and handlers[signal.SIGINT] == handlers[signal.SIGTERM] == later


def test_full_disk_keeps_saved_checkpoints(args, tmp_path, uninterrupted_run):
    """Full from step 6 on: warnings, and an error when the last save fails. With free space again the run completes."""
    full = Fork("tests/fault_injection.py", *args, FAULT="evaluation full_disk").result()
    assert re.findall(r"warning: (.*) is not saved \(.*File too large", full.stdout) == [
        "model_best.pt", "step 8", "model_best.pt", "model_best.pt"]
    assert_user_error(full, "step 12 is not saved", "File too large",
                      f"the last checkpoint is {tmp_path}/model_00004.pt", "free disk space")
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == [
        "model_00000.pt", "model_00004.pt", "model_best.pt", "optim_00000.pt", "optim_00004.pt"]
    assert run("-m", "scripts.train", *args).returncode == 0
    assert_same_results(uninterrupted_run, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a running process can be set on Linux only")
def test_out_of_memory_names_a_smaller_micro_batch_size(byte_data, tmp_path):
    """8,001 x 512 tokens need 4 GB in the first layer alone. 3,429 is a seventh of the 24,003 sequences per step."""
    fork = Fork("-m", "scripts.train", "--data_root", byte_data, "--log_dir", tmp_path, *TINY_BYTES, "--model.n_embd",
                256, "--seq_len", 512, "--micro_batch_size", 8001, "--total_batch_size", 24003 * 512)
    resource.prlimit(fork.pid, resource.RLIMIT_AS, (4 * 2**30, resource.RLIM_INFINITY))
    assert_user_error(fork.result(), "--micro_batch_size 8001", "pass --micro_batch_size 3429")
    assert not list(tmp_path.glob("*.pt"))


def test_run_lock_rejects_second_run_in_log_dir(args, tmp_path):
    with run_lock(tmp_path):
        assert_user_error(run("-m", "scripts.train", *args), f"'{tmp_path}' is in use by process {os.getpid()} on ",
                          "another --log_dir")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, message", [(["--eval_every", "0"], "step 1: loss nan"),
                                            (["--max_steps", "1"], "step 1: norm of the weights inf"),
                                            (["--max_steps", "1", "--max_lr", "1e17"], "next loss nan"),
                                            (["--eval_every", "1"], "step 1: validation loss nan")])
def test_diverged_run_stops_and_saves_nothing(args, tmp_path, flags, message):
    """The first update ruins the weights; whichever check fails first, the error has the step and advice."""
    done = run("-m", "scripts.train", *args, "--max_lr", "1e30", "--warmup_steps", "0", "--grad_clip", "0", *flags)
    assert_user_error(done, message, "has diverged", f"resumes from {tmp_path}/model_00000.pt", "lower --max_lr")
    assert [path.name for path in tmp_path.glob("model_*.pt")] == ["model_00000.pt"]
    assert list(metrics(tmp_path, "train")) == [0] and metrics(tmp_path, "val") == {}
