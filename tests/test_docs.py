"""README.md and docs/: the training commands in them have settings that go together."""

import re
import shlex

import pytest

from gpt.dataloader import grad_accum_steps
from gpt.resolve import check_config as check
from scripts.cli import parse_args
from scripts.train import TrainConfig
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
TRAINING = re.compile(r"(?:\w+=\S+ )?(?:python|torchrun|sbatch) .*(?:scripts[./]train\b|configs/slurm\.sh)")
COMMANDS = [(page.name, shlex.split(line, comments=True)) for page in PAGES
            for block in re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL)
            for line in block.replace("\\\n", " ").splitlines() if TRAINING.match(line)]


@pytest.mark.parametrize("page, words", COMMANDS, ids=lambda value: value if isinstance(value, str) else "")
def test_the_batch_of_every_training_command_divides(page, words, tmp_path):
    """By the number of processes that the command starts, its flags and its --config."""
    pairs = (word.split("=") for word in words if "=" in word)
    numbers = {flag: int(value) for flag, value in pairs if value.isdigit()}
    nodes = numbers.get("--nnodes", numbers.get("--nodes", 2 if "configs/slurm.sh" in words else 1))
    ranks = nodes * numbers.get("--nproc_per_node", 8 if "configs/slurm.sh" in words else 1)
    at = next(i for i, word in enumerate(words) if word in ("scripts.train", "scripts/train.py", "configs/slurm.sh"))
    flags = words[at + 1:]
    if "--help" in flags or "log/config.yaml" in flags:
        return
    config = parse_args(TrainConfig, flags)
    config.log_dir = str(tmp_path)
    check(config)
    assert grad_accum_steps(config.total_batch_size, config.micro_batch_size, config.seq_len, ranks) >= 1
