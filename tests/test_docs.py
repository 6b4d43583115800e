"""README.md and docs/: the training commands in them have settings that fit together."""

import re
import shlex

import pytest

from gpt.dataloader import grad_accum_steps
from gpt.resolve import check_config
from scripts.cli import parse_args
from scripts.train import TrainConfig
from tests.conftest import ROOT

TRAINING = re.compile(r"(?:\w+=\S+ )?(?:python|torchrun|sbatch) .*(?:scripts[./]train\b|configs/slurm\.sh)")
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
COMMANDS = [(page.name, shlex.split(line, comments=True)) for page in PAGES
            for block in re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL)
            for line in block.replace("\\\n", " ").splitlines() if TRAINING.match(line)]


@pytest.mark.parametrize("page, argv", COMMANDS, ids=lambda value: value if isinstance(value, str) else "")
def test_batch_of_every_training_command_divides(page, argv, tmp_path):
    """By the number of processes that the command starts, its flags and its --config."""
    pairs = (word.split("=") for word in argv if "=" in word)
    numbers = {flag: int(value) for flag, value in pairs if value.isdigit()}
    nodes = numbers.get("--nnodes", numbers.get("--nodes", 2 if "configs/slurm.sh" in argv else 1))
    world_size = nodes * numbers.get("--nproc_per_node", 8 if "configs/slurm.sh" in argv else 1)
    at = next(i for i, word in enumerate(argv) if word in ("scripts.train", "scripts/train.py", "configs/slurm.sh"))
    flags = argv[at + 1:]
    if "--help" not in flags and "log/config.yaml" not in flags:
        config = parse_args(TrainConfig, [*flags, "--log_dir", str(tmp_path)])
        check_config(config)
        assert grad_accum_steps(config.total_batch_size, config.micro_batch_size, config.seq_len, world_size) >= 1
