"""Several ranks train like one, stop together, and name a rank that fails."""

import os
import re
import signal

import pytest
import torch

from gpt import checkpoint
from gpt.dataloader import DataLoaderLite
from gpt.distributed import Ranks, init_ranks
from gpt.errors import UserError
from tests.conftest import (
    RUN,
    TINY_BYTES,
    assert_same_results,
    assert_user_error,
    metrics,
    run,
    run_ranks,
    start,
    start_ranks,
)


def train_args(data_root, log_dir, *args):
    return ["-m", "scripts.train", "--data_root", data_root, "--log_dir", log_dir, *TINY_BYTES,
            "--sample_every", "0", "--eval_every", "0", *args]


def last_step(log_dir):
    """Return the step of the newest checkpoint; all newer ones are a failure."""
    return checkpoint.load_latest(log_dir, pytest.fail, with_optim=True)[1]["step"]


@pytest.mark.parametrize("variables", [
    {"RANK": "1"}, {"WORLD_SIZE": "2", "RANK": "0"}, {"WORLD_SIZE": ""},
    {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}])
def test_variables_of_another_launcher_do_not_make_ranks(variables, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with init_ranks("cpu", rank_timeout=1) as ranks:
        assert (ranks.rank, ranks.world_size) == (0, 1)


@pytest.mark.parametrize("ranks, micro_batch_size, precision, tolerance", [
    (2, 8, "float32", 1e-5), (2, 8, "bf16", 1e-3),
    *(pytest.param(ranks, size, "float32", 1e-5, marks=pytest.mark.slow)
      for ranks in (1, 2, 4) for size in (1, 2, 4))])
def test_ranks_train_as_one(byte_data, tmp_path, ranks, micro_batch_size, precision, tolerance):
    """With micro-batches of any size, and if the run is resumed on one rank. docs/cluster.md has
    the differences."""
    args = ["--total_batch_size", "1024", "--max_lr", "1e-3", "--warmup_steps", "0",
            "--min_lr_ratio", "1", "--eval_every", "5", "--precision", precision,
            "--micro_batch_size"]
    one = run(*train_args(byte_data, tmp_path / "one", *args, 1, "--max_steps", "15"))
    several = run_ranks(ranks, *train_args(byte_data, tmp_path / "several", *args, micro_batch_size,
                                           "--max_steps", 10))
    statuses = [done.returncode for done in (one, *several)]
    assert statuses == [0] * (1 + ranks), one.stderr + several[0].stderr
    assert several[0].stdout.count("val loss") == 2
    assert not any(done.stdout for done in several[1:])
    resumed = run(*train_args(byte_data, tmp_path / "several", *args, 16, "--max_steps", "15"))
    changed = f"changed: micro_batch_size {micro_batch_size} -> 16; max_steps 10 -> 15\n"
    assert changed in resumed.stdout
    for split, steps in (("train", range(15)), ("val", (5, 10, 15))):
        losses, expected = (
            {step: record["loss"] for step, record in metrics(tmp_path / name, split).items()}
            for name in ("several", "one"))
        assert list(losses) == list(steps)
        assert losses == pytest.approx(expected, abs=tolerance)
        largest = max(abs(losses[step] - expected[step]) for step in steps)
        print(f"{ranks} ranks, micro-batch {micro_batch_size}, {precision}: largest difference of "
              f"{split} losses {largest:.1e}")


def test_ranks_take_the_sequences_of_a_step_in_order(byte_data):
    """Micro-step by micro-step, and within each rank by rank."""
    args = dict(data_root=byte_data, split="train", seq_len=32, vocab_size=256,
                total_batch_size=256)
    ranks = [DataLoaderLite(**args, micro_batch_size=2, rank=rank, world_size=2)
             for rank in range(2)]
    parts = [rank.batch(5, micro_step)[0] for micro_step in range(2) for rank in ranks]
    whole = DataLoaderLite(**args, micro_batch_size=8).batch(5, 0)[0]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("fault, message", [
    ("evaluation SIGSTOP", "Ranks? 1 failed to pass monitoredBarrier"),
    ("step SIGKILL", ""),
    ("step error", "error: injected"),
    ("evaluation nan", "error: step 6: validation loss nan")])
def test_faulty_rank_ends_the_run(byte_data, tmp_path, fault, message):
    """Hung, dead, failed, or with NaN weights: both ranks end, and nothing is saved."""
    timeout = 10 if fault == "evaluation SIGSTOP" else 600
    ranks = start_ranks(2, "tests/fault_injection.py", *train_args(byte_data, tmp_path)[2:],
                        "--max_steps", "8", "--save_every", "4", "--eval_every", "2",
                        "--rank_timeout", timeout, FAULT=fault)
    first = ranks[0].result()
    if fault == "evaluation SIGSTOP":
        os.kill(ranks[1].pid, signal.SIGKILL)
    second = ranks[1].result()
    assert first.returncode != 0 != second.returncode
    assert re.search(message, first.stderr + second.stderr)
    assert last_step(tmp_path) == 4


def test_signal_to_any_rank_stops_all_at_one_step(byte_data, tmp_path):
    done = run_ranks(2, "tests/fault_injection.py", *train_args(byte_data, tmp_path)[2:],
                     FAULT="step SIGTERM")
    assert [rank.returncode for rank in done] == [143, 143]
    assert re.findall(r"stopped at step (\d+)", done[0].stdout) == ["7"]
    assert last_step(tmp_path) == 7


def test_value_that_only_one_rank_has_differs(monkeypatch):
    """Such as a shard that another rank does not see."""
    ranks = Ranks(1, 2, torch.device("cpu"))
    for expected, values in (({"a": 1}, {"a": 1, "b": 2}), ({"a": 1, "b": 2}, {"a": 1})):
        monkeypatch.setattr(ranks, "broadcast", lambda _, expected=expected: expected)
        with pytest.raises(UserError, match="rank 1 has b "):
            ranks.assert_equal(values)


def test_every_rank_prints_its_user_error(byte_data, tmp_path):
    """An error on all ranks, or different flags on one rank. Nothing is written."""
    for done in run_ranks(2, *train_args("missing", tmp_path / "log")):
        assert_user_error(done, "data_root 'missing' has no train_*.npy")
    _, second = run_ranks(2, *train_args(byte_data, tmp_path / "log"),
                          rank_args={1: ["--max_lr", "1"]})
    assert_user_error(second, "rank 1 has max_lr 1.0, rank 0 has 0.01: start all ranks")
    assert not list(tmp_path.rglob("*.pt"))


def test_torchrun_restarts_the_job_when_a_rank_dies(byte_data, tmp_path, monkeypatch):
    """torchrun names the dead rank; the job resumes from the last checkpoint, and ends like an
    uninterrupted one."""
    args = ["--data_root", byte_data, *RUN, "--log_dir"]
    whole = run_ranks(2, "-m", "scripts.train", *args, tmp_path / "whole")
    assert whole[0].returncode == 0
    monkeypatch.setenv("FAULT", "step SIGKILL")
    process = start("torchrun", "--standalone", "--nproc_per_node=2", "--max-restarts=1",
                    "tests/fault_injection.py", *args, tmp_path / "killed")
    printed = process.communicate(timeout=200)[0]
    assert process.returncode == 0, printed
    assert re.search(r"failed \(exitcode: -9\) local_rank: 1", printed), printed
    assert re.search(r"resuming from .*/model_00004.pt at step 4 of 12\n", printed)
    assert_same_results(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("signum, message", [(signal.SIGTERM, r"stopped at step \d+ of"),
                                             (signal.SIGKILL, "error: torchrun has exited")])
def test_ranks_exit_with_torchrun(byte_data, tmp_path, signum, message):
    """A preempted job stops at one step and saves; no orphaned rank trains on and holds the lock of
    log_dir."""
    args = train_args(byte_data, tmp_path, "--max_steps", "100000")
    process = start("torchrun", "--standalone", "--nproc_per_node=2", "scripts/train.py", *args[2:])
    printed = ""
    for line in process.stdout:  # until the last rank has closed it
        printed += line
        if line.startswith("step 5 "):
            process.send_signal(signum)
    assert process.wait() != 0
    assert re.search(message, printed), printed
    step = last_step(tmp_path)
    assert run(*args, "--max_steps", str(step + 1)).returncode == 0
    assert list(metrics(tmp_path, "train")) == list(range(step + 1))
    assert (step > 5) == (signum == signal.SIGTERM)
