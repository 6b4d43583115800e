"""Several processes: as good as one, and when one of them fails, one message that names it."""

import os
import re
import shutil
import signal
import time

import numpy as np
import pytest

from gpt import checkpoint
from gpt.dataloader import DataLoaderLite
from tests.conftest import TINY_BYTES, metrics, run, run_ranks, start, workers
from tests.soak import assert_equal_runs

QUIET = ["--sample_every", "0", "--eval_every", "0", "--save_every", "5"]


def words_for(data_root, log_dir, *words):
    """A run on bytes with the given settings."""
    return ["-m", "scripts.train", "--data_root", data_root, "--log_dir", log_dir, *TINY_BYTES, *QUIET, *words]


def torchrun(ranks, *words):
    """The words of torchrun for `start`."""
    return ["torchrun", "--standalone", f"--nproc_per_node={ranks}", *words]


def test_the_number_of_processes_may_change_in_the_middle(byte_data, tmp_path):
    """Four processes, all killed, then one with other micro-batches: the losses of a run that one process made."""
    words = ["--max_steps", "12", "--total_batch_size", "2048", "--max_lr", "1e-3"]
    alone = run(*words_for(byte_data, tmp_path / "alone", *words, "--micro_batch_size", "2"))
    assert alone.returncode == 0, alone.stderr
    process = start(*torchrun(4, *words_for(byte_data, tmp_path / "moved", *words, "--micro_batch_size", "1")))
    for line in process.stdout:
        if line.startswith("step 6 "):
            for pid in [process.pid, *workers(process.pid)]:
                os.kill(pid, signal.SIGKILL)
    done = run(*words_for(byte_data, tmp_path / "moved", *words))
    assert done.returncode == 0 and "model_00005.pt at step 5 of 12, changed: micro_batch_size 1 -> 4" in done.stdout
    assert_same_losses(tmp_path / "alone", tmp_path / "moved", 12)


def test_bf16_losses_on_two_ranks_differ_by_its_rounding(byte_data, tmp_path):
    """What docs/cluster.md says of bfloat16: other micro-batches and ranks agree to 1e-3, not to 1e-5."""
    words = ["--max_steps", "10", "--total_batch_size", "2048", "--max_lr", "1e-3", "--precision", "bf16"]
    one = run(*words_for(byte_data, tmp_path / "one", *words))
    two = run_ranks(2, *words_for(byte_data, tmp_path / "two", *words, "--micro_batch_size", "8"))
    assert one.returncode == two[0].returncode == 0, one.stderr + two[0].stderr
    assert_same_losses(tmp_path / "one", tmp_path / "two", 10, tolerance=1e-3)


def assert_same_losses(one, other, steps, tolerance=1e-5):
    """Step by step. (A learning rate ten times as high turns the differences in rounding into larger ones.)"""
    one, other = metrics(one, "train"), metrics(other, "train")
    assert list(one) == list(other) == list(range(steps))
    for step in one:
        assert one[step]["loss"] == pytest.approx(other[step]["loss"], abs=tolerance)
        assert one[step]["tokens"] == other[step]["tokens"]


@pytest.mark.slow
def test_any_number_of_processes_and_any_micro_batch(data_root, tmp_path):
    """1, 2 and 4 processes with micro-batches of 1, 2 and 4 on GPT-2's vocabulary: the table of the README."""
    losses = {}
    for ranks in (1, 2, 4):
        for micro_batch_size in (1, 2, 4):
            log_dir = tmp_path / f"{ranks}_{micro_batch_size}"
            words = words_for(data_root, log_dir, "--model.vocab_size", "50257", "--total_batch_size", "1024",
                              "--micro_batch_size", micro_batch_size, "--max_lr", "1e-3", "--max_steps", "30")
            done = run(*words) if ranks == 1 else run_ranks(ranks, *words)[0]
            assert done.returncode == 0, done.stderr
            assert_same_losses(tmp_path / "1_1", log_dir, 30)
            losses[ranks, micro_batch_size] = [record["loss"] for record in metrics(log_dir, "train").values()]
    for key, mine in losses.items():
        difference = np.abs(np.subtract(mine, losses[1, 1])).max()
        print(f"{key[0]} processes, micro-batch {key[1]}: loss {mine[0]:.6f} at step 0, {mine[29]:.6f} at step 29, "
              f"largest difference {difference:.1e}")


def test_a_rank_that_dies_brings_the_job_back(byte_data, tmp_path):
    """torchrun --max-restarts: the dead rank is named, the job goes on from the last checkpoint, and ends the same."""
    words = ["--max_steps", "40", "--total_batch_size", "2048"]
    whole = run_ranks(2, *words_for(byte_data, tmp_path / "whole", *words))
    assert whole[0].returncode == 0, whole[0].stderr
    process = start("torchrun", "--standalone", "--max-restarts=3", "--nproc_per_node=2",
                    *words_for(byte_data, tmp_path / "log", *words))
    printed = ""
    for line in process.stdout:
        if line.startswith("step 7 ") and "resuming" not in printed:
            os.kill(workers(process.pid)[1], signal.SIGKILL)
        printed += line
    assert process.wait() == 0, printed
    assert printed.count("error: ") <= 1 and re.search(r"failed \(exitcode: -9\) local_rank: 1", printed), printed
    assert re.search(r"resuming from .*/model_\d+.pt at step \d+ of 40", printed)
    assert_equal_runs(tmp_path / "whole", tmp_path / "log")


def ends_with(process, seconds):
    """The one line of error that torchrun's workers print; torchrun itself is not waited for."""
    began, printed = time.monotonic(), []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("error"):
            assert time.monotonic() - began < seconds
            for pid in [*workers(process.pid), process.pid]:
                os.kill(pid, signal.SIGKILL)
    process.wait()
    errors = [line for line in printed if line.startswith("error")]
    assert len(errors) == 1 and "most recent call last" not in "".join(printed), "".join(printed)
    return errors[0]


def test_a_hung_rank_is_named(byte_data, tmp_path):
    """A stopped process, as a dead machine looks from outside: the others do not wait for it in silence."""
    words = words_for(byte_data, tmp_path / "log", "--max_steps", "100000", "--rank_timeout", "10")
    process = start(*torchrun(2, *words))
    for line in process.stdout:
        if line.startswith("step 3 "):
            os.kill(workers(process.pid)[1], signal.SIGSTOP)
            break
    assert "error: rank 1 of 2 does not answer: it died, or hung for 10 s" in ends_with(process, 60)
    assert checkpoint.load_latest(tmp_path / "log", print, require_optim=True)[1]["step"] % 5 == 0


@pytest.mark.parametrize("fault, said", [
    ("hang", r"error: rank 1 of 2 does not answer: it died, or hung for 10 s.* resumes from the last checkpoint"),
    ("nan", r"step 6: loss nan on rank 1.* resumes from .*model_00005.pt"),
    ("drift", r"rank 1 has weights_checksum \d+, rank 0 has \d+: .*nothing is saved; resume from .*model_00005.pt")])
def test_a_faulty_rank_is_named(byte_data, tmp_path, monkeypatch, fault, said):
    """Stuck in its own work, at odds with arithmetic, or with weights of its own: never silent, never saved."""
    monkeypatch.setenv("FAULT", fault)
    words = words_for(byte_data, tmp_path / "log", "--max_steps", "20", "--rank_timeout", 10)
    process = start(*torchrun(2, "tests/fault_injection.py", *words[2:]))
    assert re.search(said, ends_with(process, 60))
    assert checkpoint.load_latest(tmp_path / "log", print, require_optim=True)[1]["step"] == 5


def test_processes_do_not_outlive_torchrun(byte_data, tmp_path):
    """torchrun killed outright: its workers must not train on unseen, with the lock of the folder."""
    words = words_for(byte_data, tmp_path / "log", "--max_steps", "100000")
    process = start(*torchrun(2, *words))
    printed, began = "", None
    for line in process.stdout:  # until the last worker has closed it
        printed += line
        if line.startswith("step 3 "):
            process.kill()
            began = time.monotonic()
    assert time.monotonic() - began < 30
    assert printed.count("error: torchrun has exited") == 1 and "most recent call last)" not in printed, printed
    assert run(*words, "--max_steps", "1").returncode == 0


def test_one_rank_alone_finds_a_mistake(byte_data, tmp_path):
    """A bad token that only rank 1 reads, and flags that only it has: one line, with its number."""
    shutil.copytree(byte_data, tmp_path / "data")
    loader = DataLoaderLite(byte_data, "train", micro_batch_size=4, seq_len=32, vocab_size=256, total_batch_size=256,
                            rank=1, world_size=2)
    sequence = loader.sequence_at(np.array([7 * 8 + 4]))[0]  # the first one of its share of step 7
    shard = np.searchsorted(loader.shard_offsets, sequence, side="right") - 1
    path = tmp_path / "data" / loader.paths[shard].name
    tokens = np.load(path).astype(np.uint16)
    tokens[(sequence - loader.shard_offsets[shard]) * 32 + 5] = 9999
    np.save(path, tokens)
    process = start(*torchrun(2, *words_for(tmp_path / "data", tmp_path / "log", "--max_steps", "20")))
    assert re.search(rf"^error \(rank 1\): shard {path} has token id 9999", ends_with(process, 60))
    other = run_ranks(2, *words_for(byte_data, tmp_path / "other"), own={1: ["--max_lr", "1"]})
    message = "error: rank 1 has max_lr 1.0, rank 0 has 0.01: start all ranks with the same flags"
    assert other[0].stderr.startswith(message) and other[0].stderr.count("\n") == 1 and not other[1].stderr
    assert not list(tmp_path.glob("other/*"))


def test_a_mistake_of_all_ranks_is_said_once(byte_data, tmp_path):
    """In the flags, and in what the flags name: not as often as there are processes."""
    for words, message in ((["--max_steps", "many"], "Error parsing --max_steps"), (["--max_steps", "-1"], "error"),
                           (["--data_root", "missing"], "error")):
        done = run(*torchrun(2, *words_for(byte_data, tmp_path, *words)))
        lines = [line for line in done.stderr.splitlines() if re.match(rf"(│ )?{message}\b", line)]
        assert len(lines) == 1, done.stderr
