"""Whatever happens to a run, it ends as if nothing had: kills, full disks, rotten files, a second run, other ranks."""

import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from gpt import checkpoint
from gpt.files import load_pt
from tests.conftest import TINY_BYTES, Fork, assert_refused, metrics, run, start
from tests.soak import OFTEN, assert_equal_runs, kill_again_and_again


def words_for(data_root, log_dir, *words):
    """The run that is disturbed: 12 steps of a tenth of a second, a validation every two, a checkpoint every three."""
    return ["-m", "scripts.train", "--data_root", data_root, "--log_dir", log_dir, *TINY_BYTES, *OFTEN,
            "--max_steps", "12", "--total_batch_size", "2048", *words]


def test_ten_kills_change_nothing(byte_data, tmp_path):
    """SIGKILL at ten random moments, with dropout: the same numbers and weights to the last bit, and no litter."""
    words = ["--max_steps", "300", "--total_batch_size", "256"]
    whole = Fork(*words_for(byte_data, tmp_path / "whole", *words))
    seed = time.time_ns()
    doing = kill_again_and_again(lambda output: Fork(*words_for(byte_data, tmp_path / "killed", *words), stdout=output),
                                 tmp_path / "killed", 10, random.Random(seed), longest_life=0.3)
    print(seed, doing)
    assert whole.wait() == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")


@pytest.fixture(scope="module")
def broken_off(byte_data, tmp_path_factory):
    """A run of 12 steps that was killed at step 8, with checkpoints at 3 and 6, and the same run undisturbed."""
    folder = tmp_path_factory.mktemp("runs")
    whole = run(*words_for(byte_data, folder / "whole"))
    assert whole.returncode == 0, whole.stderr
    process = start(*words_for(byte_data, folder / "killed"))
    for line in process.stdout:
        if line.startswith("step 8 "):
            process.kill()
    assert process.wait() == -signal.SIGKILL
    assert sorted(path.name for path in (folder / "killed").glob("*_0*.pt")) == [
        "model_00000.pt", "model_00003.pt", "model_00006.pt", "optim_00003.pt", "optim_00006.pt"]
    return folder


class Code:
    """A pickle that writes a file when a careless program loads it."""

    def __reduce__(self):
        return os.mkdir, ("code_was_run",)


# What is done to the files of step 6, and what is said of it. Of all of them the run must recover by itself.
DAMAGES = {
    "a truncated model": (lambda f: truncate(f / "model_00006.pt"), "model_00006.pt is damaged"),
    "a truncated optimizer": (lambda f: truncate(f / "optim_00006.pt"), "optim_00006.pt is damaged"),
    "a flipped bit in the weights": (lambda f: flip(f / "model_00006.pt"), "model_00006.pt is damaged"),
    "a flipped bit in the optimizer": (lambda f: flip(f / "optim_00006.pt"), "optim_00006.pt is damaged"),
    "an empty file": (lambda f: (f / "model_00006.pt").write_bytes(b""), "model_00006.pt is damaged"),
    "a text file": (lambda f: (f / "model_00006.pt").write_text("To be"), "model_00006.pt is damaged"),
    "a pickle with code": (lambda f: (f / "model_00006.pt").write_bytes(pickle.dumps(Code())), "is damaged"),
    "code in a torch file": (lambda f: torch.save({"model": Code()}, f / "model_00006.pt"), "is damaged"),
    "a missing half": (lambda f: (f / "optim_00006.pt").unlink(), "optim_00006.pt is missing"),
    "an older file of that name": (lambda f: shutil.copy(f / "model_00003.pt", f / "model_00006.pt"),
                                   "model_00006.pt: it is of step 3, not 6"),
    "an older half of that name": (lambda f: shutil.copy(f / "optim_00003.pt", f / "optim_00006.pt"),
                                   "optim_00006.pt was not saved with it"),
    "the half of another run": (lambda f: shutil.copy(f.parent / "other" / "optim_00012.pt", f / "optim_00006.pt"),
                                "optim_00006.pt was not saved with it"),
    "the model of another run": (lambda f: shutil.copy(f.parent / "other" / "model_00006.pt", f),
                                 "optim_00006.pt was not saved with it"),
    "another shape of model": (lambda f: shutil.copy(f.parent / "larger" / "model_00006.pt", f),
                               "optim_00006.pt was not saved with it"),
    "rubbish in the metrics": (lambda f: append(f / "metrics.jsonl", b'\xff\x00{"step": "x", "split": 3, "loss": []}\n'
                                                                     b'[1]\n{"step": 11, "spl'), "resuming"),
    "what a kill leaves": (lambda f: (f / ".model_00009.pt.tmp").write_bytes(b"half"), "resuming"),
}


def truncate(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 9 // 10])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def append(path, content):
    with open(path, "ab") as file:
        file.write(content)


def test_damaged_files_are_named_and_the_run_recovers(byte_data, broken_off, tmp_path):
    """Each kind of damage to the newest checkpoint: the run says so, goes on from a good one and ends as it should."""
    for name, flag, value in (("other", "--seed", "5"), ("larger", "--model.n_embd", "18")):
        done = run(*words_for(byte_data, tmp_path / name, flag, value))
        assert done.returncode == 0, done.stderr
    for number, (name, (damage, words)) in enumerate(DAMAGES.items()):
        log_dir = tmp_path / str(number)
        shutil.copytree(broken_off / "killed", log_dir)
        damage(log_dir)
        done = run(*words_for(byte_data, log_dir))
        assert done.returncode == 0 and words in done.stdout, (name, done.stdout, done.stderr)
        expected = "00006" if words == "resuming" else "00003"
        assert f"resuming from {log_dir}/model_{expected}.pt at step {int(expected)} of 12" in done.stdout, name
        assert_equal_runs(broken_off / "whole", log_dir)
    assert not os.path.exists("code_was_run")


def test_no_good_checkpoint_is_a_refusal(byte_data, broken_off, tmp_path):
    """Nobody starts over by accident, and nothing of what is left is lost."""
    shutil.copytree(broken_off / "killed", tmp_path / "log")
    for path in tmp_path.glob("log/*_0*.pt"):
        truncate(path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "log").iterdir() if path.name[:5] != ".lock"}
    done = run(*words_for(byte_data, tmp_path / "log"))
    assert_refused(done, "none of the 3 checkpoints", "move the damaged files away")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "log").iterdir()}


def limit_files(process, size):
    """From now on the process cannot write a file beyond `size` bytes, as if its disk was full; None: no limit."""
    size = resource.RLIM_INFINITY if size is None else size
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


linux = pytest.mark.skipif(sys.platform != "linux", reason="limits of a running process can be set on Linux only")


@linux
@pytest.mark.parametrize("size, lost", [(80_000, ["optim_"]), (1000, ["model_best.pt", "metrics.jsonl"])])
def test_a_full_disk_is_waited_out(byte_data, broken_off, tmp_path, size, lost):
    """Full until the first failure: a warning, the checkpoint before it whole, no litter, and a good end."""
    process, log_dir = start(*words_for(byte_data, tmp_path / "log")), tmp_path / "log"
    printed = ""
    for line in process.stdout:
        printed += line
        if line.endswith("model_00003.pt\n"):
            limit_files(process, size)
        if line.startswith("warning: step"):
            process.send_signal(signal.SIGSTOP)
            steps = {part: {checkpoint.parse_step(path) for path in log_dir.glob(f"{part}_*.pt")} - {-1}
                     for part in ("model", "optim")}
            assert steps["optim"] <= steps["model"] and not list(log_dir.glob(".*.tmp"))
            newest = checkpoint.load_latest(log_dir, pytest.fail, require_optim=True)[1]
            assert newest["step"] == max(steps["model"]) >= 3
            limit_files(process, None)
            process.send_signal(signal.SIGCONT)
    assert process.wait() == 0, printed
    assert re.search(rf"warning: step \d+ is not saved \(.*File too large.*\), the last checkpoint is {log_dir}/"
                     rf"model_\d+.pt; training continues", printed), printed
    warnings = [line for line in printed.splitlines() if line.startswith("warning: ") and "File too large" in line]
    assert all(any(file in line for line in warnings) for file in lost), printed
    assert "Traceback" not in printed
    for split in ("train", "val"):
        assert metrics(log_dir, split) == metrics(broken_off / "whole", split)
    weights, same = (checkpoint.load_checkpoint(folder / "model_00012.pt")["model"]
                     for folder in (log_dir, broken_off / "whole"))
    assert all(torch.equal(weights[key], same[key]) for key in weights)


@linux
def test_the_last_save_failing_is_an_error(byte_data, broken_off, tmp_path):
    """A run must not say that it is done when its end is not saved; with room again it ends as it should."""
    process, log_dir = start(*words_for(byte_data, tmp_path / "log"), stderr=subprocess.PIPE), tmp_path / "log"
    for line in process.stdout:
        if line.endswith("model_00003.pt\n"):
            limit_files(process, 80_000)
    assert_refused(subprocess.CompletedProcess([], process.wait(), "", process.stderr.read()),
                   f"step 12 is not saved ([Errno 27] File too large: '{log_dir}/optim_00012.pt')", "free disk space")
    assert not (log_dir / "model_00012.pt").exists() and not list(log_dir.glob(".*"))
    done = run(*words_for(byte_data, log_dir))
    assert done.returncode == 0 and "resuming from" in done.stdout
    assert_equal_runs(broken_off / "whole", log_dir)


def test_two_runs_in_one_folder(byte_data, tmp_path):
    """The second is refused and told by whom; when the first is killed, its lock is gone with it."""
    words = ["-m", "scripts.train", "--data_root", byte_data, "--log_dir", tmp_path, *TINY_BYTES, "--sample_every", "0",
             "--max_steps", "100000", "--eval_every", "0"]
    first = start(*words)
    for line in first.stdout:
        if line.startswith("step 0 "):
            assert_refused(run(*words), f"'{tmp_path}' is in use by process {first.pid} on ",
                           "another --log_dir")
            first.kill()
    assert first.wait() == -signal.SIGKILL
    again = run(*words, "--max_steps", "1")
    assert again.returncode == 0, again.stderr
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_every_flip_and_cut_is_seen(broken_off, tmp_path):
    """100 random bytes flipped and every tenth cut off, in both halves: the same state or an older one, never another.

    In this process, for speed: what `scripts.train` resumes from is what `checkpoint.load_latest` returns.
    """
    for path in (broken_off / "killed").glob("*_0*.pt"):
        shutil.copy(path, tmp_path)
    good = {step: [load_pt(tmp_path / f"{half}_{step:05d}.pt") for half in ("model", "optim")]
            for step in (3, 6)}
    rng, outcomes = random.Random(0), []
    for name in ("model_00006.pt", "optim_00006.pt"):
        whole = (tmp_path / name).read_bytes()
        places = rng.sample(range(len(whole)), 80) + rng.sample(range(len(whole) - 5000, len(whole)), 20)
        damaged = [whole[:len(whole) * tenth // 10] for tenth in range(10)]
        damaged += [whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1:] for at in places]
        for content in damaged:
            (tmp_path / name).write_bytes(content)
            said = []
            path, model, optim = checkpoint.load_latest(tmp_path, said.append, require_optim=True)
            assert said and name in said[0] if model["step"] == 3 else not said
            assert path.name == f"model_{model['step']:05d}.pt"
            assert_same_content([model, optim], good[model["step"]])
            outcomes.append(model["step"])
        (tmp_path / name).write_bytes(whole)
    assert len(outcomes) == 220 and outcomes.count(3) > 150  # a flip between the entries of the archive is harmless
    print(f"{len(outcomes)} damaged files, {outcomes.count(3)} passed over, {outcomes.count(6)} unharmed in content")


def assert_same_content(one, other):
    """Nested dictionaries and lists of tensors and plain values, to the last bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
    if isinstance(one, dict | list | tuple):
        for a, b in zip(one.values() if isinstance(one, dict) else one,
                        other.values() if isinstance(other, dict) else other, strict=True):
            assert_same_content(a, b)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
