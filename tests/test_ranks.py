"""Several ranks train like one, stop together, and name a rank that hangs."""

import re
import signal

import pytest

from gpt.checkpoint import load_latest
from gpt.distributed import init_ranks
from tests.conftest import (
    TINY_BYTES,
    assert_same_results,
    assert_user_error,
    metrics,
    run,
    run_ranks,
    start,
    start_ranks,
)


def last_step(log_dir):
    """Return the step of the newest checkpoint, which must be usable."""
    return load_latest(log_dir, pytest.fail, with_optim=True).model["step"]


def test_variables_of_another_launcher_do_not_make_ranks(monkeypatch):
    """Such as SLURM's; a notebook can leave an empty one."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "")
    with init_ranks("cpu", rank_timeout=1) as ranks:
        assert ranks.world_size == 1


@pytest.mark.parametrize("ranks, micro_batch_size", [
    (2, 8), *(pytest.param(ranks, size, marks=pytest.mark.slow)
              for ranks in (1, 2, 4) for size in (1, 2, 4))])
def test_ranks_train_as_one(byte_data, tmp_path, ranks, micro_batch_size):
    """With micro-batches of any size, and if the run is resumed on one rank. docs/cluster.md has
    the differences. Every run ends with a validation."""
    flags = ("--sample_every 0 --total_batch_size 1024 --max_lr 1e-3 --warmup_steps 0 "
             "--min_lr_ratio 1 --eval_every 10 --micro_batch_size")
    args = ["-m", "scripts.train", "--data_root", byte_data, *TINY_BYTES, *flags.split()]
    parts = [("one", 1, 1, 15), ("several", ranks, micro_batch_size, 10), ("several", 1, 16, 15)]
    for name, count, size, max_steps in parts:
        for done in run_ranks(count, *args, size, "--max_steps", max_steps, "--log_dir",
                              tmp_path / name):
            assert done.returncode == 0, done.stderr
    for split, steps in (("train", range(15)), ("val", (10, 15))):
        one, several = (metrics(tmp_path / name, split) for name in ("one", "several"))
        assert list(several) == list(steps)
        largest = max(abs(one[step]["loss"] - several[step]["loss"]) for step in steps)
        print(f"{ranks} ranks, micro-batch {micro_batch_size}: largest difference of {split} "
              f"losses {largest:.1e}")
        assert largest < 1e-5


@pytest.mark.parametrize("fault, message", [
    ("evaluation SIGSTOP", "Ranks? 1 failed to pass monitoredBarrier in 2000 ms"),
    ("step SIGKILL", "failed to pass monitoredBarrier|by peer"),
    ("step crash", "RuntimeError: injected")])
def test_faulty_rank_ends_the_run(args, log_dir, fault, message):
    """Hung, dead or failed: both ranks end, and nothing is saved. A hung one is named after
    --rank_timeout (1,200 s, of which fault_injection.py leaves 2)."""
    ranks = start_ranks(2, "tests/fault_injection.py", *args, "--rank_timeout", 1200, FAULT=fault)
    first = ranks[0].result()
    if "SIGSTOP" in fault:
        ranks[1].process.kill()
    second = ranks[1].result()
    assert first.returncode != 0
    assert second.returncode != 0
    assert re.search(message, first.stderr + second.stderr)
    assert last_step(log_dir) == 4


def test_signal_to_any_rank_stops_all_at_one_step(args, log_dir):
    """Even if the rank gets it twice: from a cluster and from torchrun. Only rank 0 prints."""
    first, second = run_ranks(2, "tests/fault_injection.py", *args, FAULT="step SIGTERM SIGTERM")
    assert first.returncode == second.returncode == 143
    assert "stopped at step 7 " in first.stdout
    assert not second.stdout
    assert last_step(log_dir) == 7


def test_rank_with_other_settings_prints_the_difference(args, log_dir):
    _, second = run_ranks(2, "-m", "scripts.train", *args, rank_args={1: ["--max_lr", 1]})
    assert_user_error(second, "rank 1 has max_lr 1.0, rank 0 has 0.01: start all ranks")
    assert not list(log_dir.glob("*.pt"))


def test_torchrun_restarts_the_job_when_a_rank_dies(args, tmp_path, monkeypatch):
    """It resumes from the last checkpoint and ends like an uninterrupted one."""
    for done in run_ranks(2, "-m", "scripts.train", *args):
        assert done.returncode == 0, done.stderr
    monkeypatch.setenv("FAULT", "step SIGKILL")
    process = start("torchrun", "--standalone", "--nproc_per_node=2", "--max-restarts=1",
                    "tests/fault_injection.py", *args, "--log_dir", tmp_path / "killed")
    printed, _ = process.communicate()
    assert process.returncode == 0, printed
    assert "model_00004.pt at step 4 of 12\n" in printed
    assert_same_results(tmp_path / "log", tmp_path / "killed")


@pytest.mark.parametrize("signum, message", [(signal.SIGTERM, "stopped at step "),
                                             (signal.SIGKILL, "error: torchrun has exited")])
def test_ranks_exit_with_torchrun(args, log_dir, signum, message):
    """A preempted job stops at one step and saves; no orphaned rank trains on and holds the lock of
    log_dir."""
    args += ["--eval_every", 0, "--save_every", 0, "--max_steps"]
    process = start("torchrun", "--standalone", "--nproc_per_node=2", "scripts/train.py", *args,
                    100_000)
    printed = ""
    for line in process.stdout:  # until the last rank has closed it
        printed += line
        if line.startswith("step 5 "):
            process.send_signal(signum)
    assert process.wait() != 0
    assert message in printed
    step = last_step(log_dir)
    assert (step > 5) == (signum == signal.SIGTERM)
    assert run("-m", "scripts.train", *args, step + 1).returncode == 0
    assert list(metrics(log_dir, "train")) == list(range(step + 1))
