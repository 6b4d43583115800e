"""README.md and docs/: their commands have valid flags and run as they stand."""

import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest

from gpt.dataloader import grad_accum_steps
from scripts.cli import parse_args
from scripts.train import TrainConfig
from tests.conftest import ROOT, TEXT
from tests.test_text_files import SPEECHES, jsonl, write

NAMES = ["training", "generation", "evaluation", "data", "position", "numbers", "speed", "laptop",
         "cluster", "troubleshooting", "not_here"]  # in the order of the commands
PAGES = [ROOT / "README.md",
         *sorted(ROOT.glob("docs/*.md"), key=lambda page: NAMES.index(page.stem))]
STARTS = r"(\w+=\S+ |timeout .*)?(python3?|torchrun|sbatch|make|pip|\.) "  # of shell commands


def commands(language: str, block: str) -> list[str]:
    """Return the shell commands in a fenced block, without comments; a Python example is one
    command."""
    if language == "python":
        return [f"python -c {shlex.quote(block)}"]
    lines = [line.split("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(STARTS, line)]


BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMANDS = [command for page in PAGES for language, block in BLOCK.findall(page.read_text())
            for command in commands(language, block)]
TRAINING = [command for command in COMMANDS
            if re.search(r"scripts[./]train\b|configs/slurm\.sh", command)
            and "--help" not in command]
# Commands that a CPU without a network cannot run, or that take longer than all others together.
NOT_RUN = {
    "installation": r"^(make|pip|\.|python3) |requirements",
    "GPUs, or GPT-2 124M at full length":
        r"nproc_per_node=8|sbatch|--nnodes|scripts\.train$|log_124M|shakespeare_gpu",
    "the Hugging Face Hub": r"\bgpt2(-xl)?( |$)|finetune_shakespeare|tinystories|fineweb",
    "benchmarks": r"benchmarks|bench generate|-m pytest",
}


@pytest.mark.parametrize("command", TRAINING)
def test_documented_train_command_has_divisible_batch(command):
    """With the number of ranks that the command starts, its flags and its --config."""
    ranks = [32] if "sbatch" in command else []  # up to four nodes, see configs/slurm.sh
    ranks += map(int, re.findall(r"--n(?:nodes|proc_per_node)=(\d+)", command))
    flags = re.split(r"scripts[./]train(?:\.py)?|configs/slurm\.sh", command)[1]
    config = parse_args(TrainConfig, shlex.split(flags, comments=True))
    micro_batch_size = 1 if config.micro_batch_size == "auto" else config.micro_batch_size
    grad_accum_steps(config.total_batch_size, micro_batch_size, config.seq_len,
                     world_size=math.prod(ranks))


@pytest.mark.slow
def test_documented_commands_run(tmp_path):
    """All but NOT_RUN, with the Python examples, in the order of the pages, in a copy of the
    repository with the files that the pages take for granted."""
    repo = tmp_path / "a clone"
    for name in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
        write(repo / name, (ROOT / name).read_bytes())
    write(repo / "my_text.txt", TEXT.read_text() * 5)
    write(repo / "books" / "a.txt", TEXT.read_text())
    write(repo / "crawl" / "a.jsonl.zst", pyarrow.compress(jsonl(SPEECHES), "zstd", asbytes=True))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PATH": path}
    selected = [command for command in COMMANDS
                if not any(re.search(pattern, command) for pattern in NOT_RUN.values())]
    assert len(selected) > 30
    for command in selected:
        print(command, flush=True)
        compares = "torch.equal" in command  # position.md: a killed and an uninterrupted run
        done = subprocess.run(command, shell=True, cwd=repo, env=env, stdin=subprocess.DEVNULL,
                              text=True, stdout=subprocess.PIPE if compares else None)
        statuses = [0, 137] if "KILL" in command else [0]  # a fast machine finishes before the kill
        assert done.returncode in statuses, command
        assert done.stdout == ("True\n" if compares else None)
