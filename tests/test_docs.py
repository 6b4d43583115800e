"""README.md and docs/: their commands have valid flags and run as they stand."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest

from gpt.dataloader import grad_accum_steps
from scripts.cli import parse_args
from scripts.train import TrainConfig
from tests.conftest import ROOT, TEXT

NAMES = ["training", "generation", "evaluation", "data", "position", "numbers", "speed", "laptop",
         "not_here",
         "cluster", "troubleshooting"]
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in NAMES)]
STARTS = r"(\w+=\S+ |timeout .*)?(python3?|torchrun|sbatch|make|pip|\.) "  # of shell commands


def commands(language: str, block: str) -> list[str]:
    """Return the shell commands in a fenced block, without comments; a Python example is one
    command."""
    if language == "python":
        return [f"python -c {shlex.quote(block)}"]
    lines = [line.split("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(STARTS, line)]


BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMANDS = [(page.name, command) for page in PAGES
            for language, block in BLOCK.findall(page.read_text())
            for command in commands(language, block)]
TRAINING = [(page, shlex.split(line, comments=True)) for page, line in COMMANDS
            if re.search(r"scripts[./]train\b|configs/slurm\.sh", line)]
# Commands that a CPU without a network cannot run, or that take longer than all others together.
NOT_RUN = {
    "installation": r"^(make|pip|\.|python3) |requirements",
    "eight GPUs, or GPT-2 124M at full length":
        r"nproc_per_node=8|sbatch|--nnodes|scripts\.train$|log_124M",
    "the Hugging Face Hub": r"\bgpt2(-xl)?( |$)|finetune_shakespeare|tinystories",
    "benchmarks": r"benchmarks|bench generate|-m pytest",
}


def test_docs_pages_are_all_listed():
    """A page that PAGES lacks would not be tested."""
    assert sorted(PAGES[1:]) == sorted(ROOT.glob("docs/*.md"))


def test_quoted_messages_exist():
    """Each message in the tables of troubleshooting.md, up to its `…`, is in the source."""
    source = " ".join(path.read_text() for folder in ("gpt", "scripts")
                      for path in ROOT.glob(f"{folder}/*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # string literals over several lines
    source = re.sub(r"\{[^{}]*\}", "…", source)
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    symptoms = re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE)
    parts = [part.strip(" :`'") for text in symptoms
             for part in re.split(r"…|warning: |`, `|'[a-z_]+'", text)]
    assert len(symptoms) > 15
    assert [part for part in parts if part and part not in source] == []


@pytest.mark.parametrize("page, argv", TRAINING,
                         ids=lambda value: value if isinstance(value, str) else "")
def test_documented_train_command_has_divisible_batch(page, argv):
    """With the number of ranks that the command starts, its flags and its --config."""
    pairs = (word.split("=") for word in argv if "=" in word)
    numbers = {flag: int(value) for flag, value in pairs if value.isdigit()}
    nodes = numbers.get("--nnodes", numbers.get("--nodes", 2 if "configs/slurm.sh" in argv else 1))
    world_size = nodes * numbers.get("--nproc_per_node", 8 if "configs/slurm.sh" in argv else 1)
    scripts = ("scripts.train", "scripts/train.py", "configs/slurm.sh")
    at = next(i for i, word in enumerate(argv) if word in scripts)
    flags = argv[at + 1:]
    if "--help" not in flags:
        config = parse_args(TrainConfig, flags)
        micro_batch_size = 1 if config.micro_batch_size == "auto" else config.micro_batch_size
        assert grad_accum_steps(config.total_batch_size, micro_batch_size, config.seq_len,
                                world_size) >= 1


@pytest.mark.slow
def test_documented_commands_run(tmp_path):
    """All but NOT_RUN, with the Python examples, in the order of the pages, in a copy of the
    repository."""
    repo = tmp_path / "a clone"
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True,
                           check=True)
    for name in files.stdout.splitlines():
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, repo / name)
    (repo / "my_text.txt").write_text(TEXT.read_text() * 5)
    for folder in ("books", "crawl"):
        (repo / folder).mkdir()
    shutil.copy(TEXT, repo / "books")
    rows = "".join(f'{{"text": "Document {i} of a crawl."}}\n' for i in range(100))
    with pyarrow.output_stream(str(repo / "crawl" / "a.jsonl.zst"), compression="zstd") as file:
        file.write(rows.encode())
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    selected = [(page, command) for page, command in COMMANDS
                if not any(re.search(pattern, command) for pattern in NOT_RUN.values())]
    assert len(selected) > 30
    for page, command in selected:
        print(f"{page}: {command}", flush=True)
        compares = "torch.equal" in command  # position.md: a killed and an uninterrupted run
        done = subprocess.run(command, shell=True, cwd=repo, env=env, stdin=subprocess.DEVNULL,
                              text=True, stdout=subprocess.PIPE if compares else None)
        assert done.returncode == (137 if "KILL" in command else 0), command
        assert done.stdout == ("True\n" if compares else None)
