"""Several ranks train like one, and one message names a rank that fails."""

import os
import re
import signal

import pytest
import torch

from gpt import checkpoint
from gpt.dataloader import DataLoaderLite
from tests.conftest import RUN, TINY_BYTES, assert_same_results, metrics, run, run_ranks, start, start_ranks


def train_args(data_root, log_dir, *args):
    return ["-m", "scripts.train", "--data_root", data_root, "--log_dir", log_dir, *TINY_BYTES, "--sample_every", "0",
            "--eval_every", "0", *args]


@pytest.mark.parametrize("ranks, micro_batch_size, precision, tolerance", [
    (2, 8, "float32", 1e-5), (2, 8, "bf16", 1e-3),
    *(pytest.param(ranks, size, "float32", 1e-5, marks=pytest.mark.slow) for ranks in (1, 2, 4) for size in (1, 2, 4))])
def test_ranks_train_as_one(byte_data, tmp_path, ranks, micro_batch_size, precision, tolerance):
    """With micro-batches of any size, and if the run is resumed on one rank. docs/cluster.md has the differences."""
    args = ["--total_batch_size", "1024", "--max_lr", "1e-3", "--warmup_steps", "0", "--min_lr_ratio", "1",
            "--eval_every", "5", "--precision", precision, "--micro_batch_size"]
    one = run(*train_args(byte_data, tmp_path / "one", *args, 1, "--max_steps", "15"))
    several = run_ranks(ranks, *train_args(byte_data, tmp_path / "several", *args, micro_batch_size, "--max_steps", 10))
    assert [done.returncode for done in (one, *several)] == [0] * (1 + ranks), one.stderr + several[0].stderr
    assert several[0].stdout.count("val loss") == 2 and not any(done.stdout for done in several[1:])
    resumed = run(*train_args(byte_data, tmp_path / "several", *args, 16, "--max_steps", "15"))
    assert f"changed: micro_batch_size {micro_batch_size} -> 16; max_steps 10 -> 15\n" in resumed.stdout
    for split, steps in (("train", range(15)), ("val", (5, 10, 15))):
        losses, expected = ({step: record["loss"] for step, record in metrics(tmp_path / name, split).items()}
                            for name in ("several", "one"))
        assert list(losses) == list(steps) and losses == pytest.approx(expected, abs=tolerance)
        print(f"{ranks} ranks, micro-batch {micro_batch_size}, {precision}: largest difference of {split} losses "
              f"{max(abs(losses[step] - expected[step]) for step in steps):.1e}")


def test_ranks_take_the_sequences_of_a_step_in_order(byte_data):
    """Micro-step by micro-step, and within each rank by rank: runs of older versions resume with the same data."""
    args = dict(data_root=byte_data, split="train", seq_len=32, vocab_size=256, total_batch_size=256)
    ranks = [DataLoaderLite(**args, micro_batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    parts = [rank.batch(5, micro_step)[0] for micro_step in range(2) for rank in ranks]
    assert torch.equal(torch.cat(parts), DataLoaderLite(**args, micro_batch_size=8).batch(5, 0)[0])


FAULTS = {
    "SIGSTOP": r"error: rank 1 of 2 does not answer \(died, or hung for 5 s.* resume from the last checkpoint",
    "SIGKILL": r"error: rank 1 of 2 does not answer \(died",
    "error": r"error \(rank 1\): injected",
    "nan": "error: step 6: loss nan on rank 1.* resumes from .*model_00004.pt",
    "drift": r"error: rank 1 has weights_checksum \d+, rank 0 has \d+: .*nothing is saved; .*model_00004.pt",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_rank_is_named(byte_data, tmp_path, fault):
    """Hung, dead, failed, with a NaN loss or other weights than rank 0: one error, and nothing is saved."""
    ranks = start_ranks(2, "tests/fault_injection.py", *train_args(byte_data, tmp_path)[2:], "--max_steps", "8",
                        "--save_every", "4", "--rank_timeout", "5", FAULT=f"step {fault}")
    first = ranks[0].result(timeout=60)
    if fault == "SIGSTOP":
        os.kill(ranks[1].pid, signal.SIGKILL)
    second = ranks[1].result(timeout=60)
    assert first.returncode != 0 != second.returncode
    errors = [line for line in (first.stderr + second.stderr).splitlines() if line.startswith("error")]
    assert len(errors) == 1 and re.match(FAULTS[fault], errors[0]), first.stderr + second.stderr
    assert "Traceback" not in first.stderr + second.stderr
    assert checkpoint.load_latest(tmp_path, pytest.fail, require_optim=True)[1]["step"] == 4


def test_signal_to_any_rank_stops_all_at_one_step(byte_data, tmp_path):
    done = run_ranks(2, "tests/fault_injection.py", *train_args(byte_data, tmp_path)[2:], FAULT="step SIGTERM")
    assert [rank.returncode for rank in done] == [143, 143]
    assert re.findall(r"stopped at step (\d+)", done[0].stdout) == ["7"]
    assert checkpoint.load_latest(tmp_path, pytest.fail, require_optim=True)[1]["step"] == 7


def test_user_error_is_printed_once(byte_data, tmp_path):
    """An error on all ranks, or different flags on one rank. Nothing is written."""
    for args, rank_args, message in ((["--data_root", "missing"], {}, "error: data_root 'missing' is not a folder"),
                               ([], {1: ["--max_lr", "1"]}, "error: rank 1 has max_lr 1.0, rank 0 has 0.01: start")):
        first, second = run_ranks(2, *train_args(byte_data, tmp_path, *args), rank_args=rank_args)
        assert first.stderr.startswith(message) and first.stderr.count("\n") == 1 and not second.stderr
    assert not list(tmp_path.iterdir())


def test_torchrun_restarts_the_job_when_a_rank_dies(byte_data, tmp_path, monkeypatch):
    """The dead rank is named; the job resumes from the last checkpoint, and ends like an uninterrupted one."""
    args = ["--data_root", byte_data, *RUN, "--log_dir"]
    assert run_ranks(2, "-m", "scripts.train", *args, tmp_path / "whole")[0].returncode == 0
    monkeypatch.setenv("FAULT", "step SIGKILL")
    process = start("torchrun", "--standalone", "--nproc_per_node=2", "--max-restarts=1", "tests/fault_injection.py",
                    *args, tmp_path / "killed")
    printed = process.communicate(timeout=200)[0]
    assert process.returncode == 0 and re.search(r"failed \(exitcode: -9\) local_rank: 1", printed), printed
    assert re.search(r"resuming from .*/model_0000[46].pt at step [46] of 12\n", printed)  # 6: rescued by rank 0
    assert_same_results(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("signum, message", [(signal.SIGTERM, r"stopped at step \d+ of"),
                                             (signal.SIGKILL, "error: (torchrun has exited|rank 1)")])
def test_ranks_exit_with_torchrun(byte_data, tmp_path, signum, message):
    """A preempted job stops at one step and saves; no orphaned rank trains on and holds the lock of log_dir."""
    args = train_args(byte_data, tmp_path, "--max_steps", "100000")
    process = start("torchrun", "--standalone", "--nproc_per_node=2", "scripts/train.py", *args[2:])
    printed = ""
    for line in process.stdout:  # until the last rank has closed it
        printed += line
        if line.startswith("step 5 "):
            process.send_signal(signum)
    assert process.wait() != 0 and len(re.findall(message, printed)) == 1, printed
    assert run(*args, "--max_steps", "1").returncode == 0
    step = checkpoint.load_latest(tmp_path, pytest.fail, require_optim=True)[1]["step"]
    assert list(metrics(tmp_path, "train")) == list(range(step)) and (step > 5) == (signum == signal.SIGTERM)
