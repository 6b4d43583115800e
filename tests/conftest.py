"""Shared fixtures and helpers: shards of real text, and commands run as a user types them."""

import json
import multiprocessing
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "tests" / "data" / "coriolanus.txt"  # the first scenes of the play; 40 kB

# A model that takes tens of milliseconds per step with GPT-2's vocabulary; in float32 on every CPU.
TINY = shlex.split(
    "--device cpu --precision float32 --model.n_layer 2 --model.n_head 2 --model.n_embd 16 "
    "--seq_len 32 --micro_batch_size 4 --total_batch_size 256 --warmup_steps 4 --max_lr 1e-2 "
    "--eval_tokens 512 --sample_tokens 8")
TINY_BYTES = [*TINY, "--model.vocab_size", "256"]
# A run of 12 steps with dropout. Its saves (steps 4, 8, 12) and its validations (2, 4, ...) do not
# all coincide.
RUN = TINY_BYTES + shlex.split(
    "--model.dropout 0.1 --max_steps 12 --save_every 4 --eval_every 2 --sample_every 0")


def save_shards(folder, tokens, *ends):
    """Write two shards for train and one for val that end at these positions and at the end of
    `tokens`."""
    names = ("train_00000", "train_00001", "val_00000")
    for name, part in zip(names, np.split(tokens, ends), strict=True):
        np.save(folder / f"{name}.npy", part)
    return folder


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """Return a folder with shards of real text in GPT-2's tokens."""
    tokens = np.array(Tokenizer().encode(TEXT.read_text()), dtype=np.uint16)
    return save_shards(tmp_path_factory.mktemp("data"), tokens, 5000, 9000)


@pytest.fixture(scope="session")
def byte_data(tmp_path_factory):
    """Return the same text as bytes, without a tokenizer: with TINY_BYTES a step takes 10 ms."""
    tokens = np.frombuffer(TEXT.read_bytes(), np.uint8)
    return save_shards(tmp_path_factory.mktemp("bytes"), tokens, 20000, 32000)


@pytest.fixture(scope="session")
def uninterrupted_run(byte_data, tmp_path_factory):
    """Return the log_dir of a finished RUN; tests only read it."""
    log_dir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train(byte_data, log_dir, *RUN)
    return log_dir


@pytest.fixture
def log_dir(tmp_path):
    """Return the path of a folder that does not exist yet."""
    return tmp_path / "log"


@pytest.fixture
def args(byte_data, log_dir):
    """Return the flags of RUN in `log_dir`."""
    return ["--data_root", byte_data, "--log_dir", log_dir, *RUN]


def random_gpt2(folder, **config):
    """Save a random GPT-2 of transformers, with weights large enough for distinct logits, and
    return its folder."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    settings = dict(n_layer=2, n_head=3, n_embd=24, n_positions=48, initializer_range=0.1) | config
    GPT2LMHeadModel(GPT2Config(**settings)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory):
    """Return a folder with a random GPT-2 with GPT-2's vocabulary, as transformers saves it."""
    return random_gpt2(tmp_path_factory.mktemp("gpt2"))


def command(*words):
    """Return the argv of `python …` with this interpreter, or of `torchrun …` as a module, which
    needs no PATH."""
    if words[0] == "torchrun":
        words = "-m", "torch.distributed.run", *words[1:]
    return [sys.executable, *map(str, words)]


def environment():
    """Return this environment with one thread per process, so that equal work gives equal bits
    under any load."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "COLUMNS": "200"}


class Fork:
    """A command in a fork of a process that has imported PyTorch, which starts ten times as fast.

    Otherwise it is as typed: a separate process runs `python -m <module>` or `python <file>` as
    __main__.
    """

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch._dynamo", "tests.conftest", "scripts.cli",
                                    "gpt.checkpoint", "gpt.evaluation", "gpt.generation",
                                    "gpt.dataloader"])

    def __init__(self, *words, **variables):
        self.words = list(map(str, words))
        variables = environment() | {name: str(value) for name, value in variables.items()}
        self.folder = tempfile.TemporaryDirectory()
        self.streams = [Path(self.folder.name) / name for name in ("stdout", "stderr")]
        arguments = (self.words, variables, *self.streams)
        self.process = self.context.Process(target=self._run, args=arguments)
        self.process.start()

    def result(self):
        """Wait for the process and return what it printed."""
        self.process.join(240)
        status = self.process.exitcode
        self.process.kill()  # if it hangs
        outputs = [stream.read_text("utf-8", "backslashreplace") for stream in self.streams]
        assert status is not None, outputs
        return subprocess.CompletedProcess(self.words, status, *outputs)

    @staticmethod
    def _run(words, variables, stdout, stderr):
        for stream, path in ((1, stdout), (2, stderr)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
        os.environ.update(variables)
        os.chdir(ROOT)
        torch.set_num_threads(1)  # as OMP_NUM_THREADS in `environment`
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")


def run(*words):
    """Run a command and capture what it prints."""
    if words[0] == "-m":
        return Fork(*words).result()
    return subprocess.run(command(*words), cwd=ROOT, env=environment(), capture_output=True,
                          text=True)


def start_ranks(count, *words, rank_args=None, **variables):
    """Start a command as `count` ranks of one process group, with torchrun's variables.

    rank_args: additional arguments by rank. variables: additional environment variables.
    """
    # torchrun, too, hosts the store where its workers meet: no port is free before it is used.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    variables = {"TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": True,
                 "TORCHELASTIC_RESTART_COUNT": 0, "WORLD_SIZE": count,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, **variables}
    forks = [Fork(*words, *(rank_args or {}).get(rank, []), RANK=rank, LOCAL_RANK=rank, **variables)
             for rank in range(count)]
    for fork in forks:
        fork.store = store  # it lives as long as they do
    return forks


def run_ranks(*args, **options):
    """Run a command with `start_ranks` and wait for all ranks."""
    return [fork.result() for fork in start_ranks(*args, **options)]


def start(*words):
    """Start a command and return immediately; what it prints can be read from one pipe."""
    return subprocess.Popen(command(*words), cwd=ROOT, env=environment(), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def train(data_root, log_dir, *words, status=0):
    """Run `python -m scripts.train` with the tiny model; it must exit with this status."""
    done = run("-m", "scripts.train", "--data_root", data_root, "--log_dir", log_dir, *TINY,
               *words)
    assert done.returncode == status, done.stdout + done.stderr
    return done


def metrics(log_dir, split):
    """Return the records of a split in metrics.jsonl by step, without the speed."""
    lines = (log_dir / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["split"] == split]
    for record in records:
        record.pop("tokens_per_s", None)
    steps = {record["step"]: record for record in records}
    assert len(steps) == len(records), "a step was logged twice"
    return steps


def assert_same_results(reference, log_dir):
    """Assert that two runs of RUN have equal records (except the speed) and weights, to the last
    bit."""
    for split in ("train", "val"):
        assert metrics(log_dir, split) == metrics(reference, split)
    for name in ("model_00012.pt", "model_best.pt"):
        weights, expected = (torch.load(folder / name)["model"] for folder in (log_dir, reference))
        torch.testing.assert_close(weights, expected, rtol=0, atol=0)
    assert not list(log_dir.glob(".*")), "temporary files left behind"


def assert_user_error(done, *words):
    """Assert exit status 2 and one or two lines, the last an error that contains `words`, without a
    traceback."""
    assert done.returncode == 2, done.stdout + done.stderr
    *others, error = done.stderr.splitlines()
    assert len(others) <= 1 and error.startswith("error: "), done.stderr
    for word in words:
        assert word in error, f"{word!r} is not in {error!r}"
