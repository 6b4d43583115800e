"""What the tests share: a little real text as shards, and commands run as a user types them."""

import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from gpt.tokenizer import get_tokenizer

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "tests" / "data" / "coriolanus.txt"  # the first scenes of the play; 40 kB

# A model that trains in tens of milliseconds a step on GPT-2's full vocabulary.
TINY = ["--device", "cpu", "--model.n_layer", "2", "--model.n_head", "2", "--model.n_embd", "16", "--seq_len", "32",
        "--micro_batch_size", "4", "--total_batch_size", "256", "--warmup_steps", "4", "--max_lr", "1e-2",
        "--eval_tokens", "512", "--sample_tokens", "8"]


@pytest.fixture(scope="session")
def data_root(tmp_path_factory) -> Path:
    """Shards of real text made by hand: two for train, one for val."""
    folder = tmp_path_factory.mktemp("data")
    tokens = np.array(get_tokenizer().encode_ordinary(TEXT.read_text()), dtype=np.uint16)
    np.save(folder / "train_00000.npy", tokens[:5000])
    np.save(folder / "train_00001.npy", tokens[5000:9000])
    np.save(folder / "val_00000.npy", tokens[9000:])
    return folder


def command(*words: str) -> list[str]:
    """`python …` with this interpreter; `torchrun …` as its module, which needs no PATH."""
    if words[0] == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", *words[1:]]
    return [sys.executable, *words]


def environment() -> dict[str, str]:
    """This environment, with one thread a process so that equal work gives equal bits whatever else runs."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}


def run(*words: str | Path, cwd: Path = ROOT, timeout: float = 240) -> subprocess.CompletedProcess:
    """Run a command to its end and capture what it prints."""
    return subprocess.run(command(*map(str, words)), cwd=cwd, env=environment(), timeout=timeout,
                          capture_output=True, text=True)


def run_in_fork(*words: str | Path) -> subprocess.CompletedProcess:
    """`run`, but by a process that has PyTorch loaded: a tenth of the time, for a test of many commands that end soon.

    All else is as typed: a process of its own, `python -m <module>` or `python <file>` with its flags as __main__.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "tests.conftest", "scripts.command_line", "gpt.checkpoint",
                                    "gpt.evaluation", "gpt.generation", "gpt.optim", "gpt.dataloader"])
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / "stdout", Path(folder) / "stderr"]
        process = context.Process(target=_become, args=([str(word) for word in words], *streams))
        process.start()
        process.join(240)
        process.kill()
        return subprocess.CompletedProcess(words, process.exitcode, *[stream.read_text() for stream in streams])


def _become(words: list[str], stdout: Path, stderr: Path) -> None:
    """Run `python <words>` in this process, its output in two files."""
    for stream, path in ((sys.stdout, stdout), (sys.stderr, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream.fileno())
    os.chdir(ROOT)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def start(*words: str | Path, **options) -> subprocess.Popen:
    """Start a command and return at once; its output, both streams unless told, can be read line by line."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
    return subprocess.Popen(command(*map(str, words)), cwd=ROOT, env=environment(), text=True, **streams)


def train(data_root: Path, log_dir: Path, *words: str | Path) -> subprocess.CompletedProcess:
    """`python -m scripts.train` with the tiny model; must succeed."""
    done = run("-m", "scripts.train", "--data_root", data_root, "--log_dir", log_dir, *TINY, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def metrics(log_dir: Path, split: str) -> dict[int, dict]:
    """The records of a split in metrics.jsonl by step, without the times."""
    records = [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text().splitlines()]
    mine = [record for record in records if record["split"] == split]
    steps = {record["step"]: {k: v for k, v in record.items() if k != "tokens_per_s"} for record in mine}
    assert len(steps) == len(mine), "a step was logged twice"
    return steps


def assert_refused(done: subprocess.CompletedProcess, *words: str) -> None:
    """Exit status 2, one or two lines that hold `words`, and no traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert 1 <= len(lines) <= 2 and lines[-1].startswith("error: "), done.stderr
    for word in words:
        assert word in lines[-1], f"{word!r} is not in {lines[-1]!r}"
