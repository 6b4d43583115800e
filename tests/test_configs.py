"""configs/: every run config is valid, and every dataset that one needs has a file in
configs/data/."""

import pytest
import yaml

from gpt.dataloader import grad_accum_steps
from scripts.cli import parse_args
from scripts.prepare import PrepareConfig
from scripts.train import TrainConfig
from tests.conftest import ROOT

RUNS = sorted(ROOT.glob("configs/*.yaml"))
DATASETS = sorted(ROOT.glob("configs/data/*.yaml"))


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_run_config_is_valid(path):
    """Otherwise a typo would be found after hours of downloading."""
    config = parse_args(TrainConfig, ["--config", str(path)])
    grad_accum_steps(config.total_batch_size, 1, config.seq_len, world_size=1)
    prepared = [yaml.safe_load(dataset.read_text())["out"] for dataset in DATASETS]
    assert config.data_root in [*prepared, "shakespeare_data", "shakespeare_data/bpe2048"]


@pytest.mark.parametrize("path", DATASETS, ids=lambda path: path.stem)
def test_data_config_names_a_dataset_and_has_a_run(path):
    config = parse_args(PrepareConfig, ["--config", str(path)])
    assert config.dataset and not config.input
    assert (ROOT / "configs" / path.name).exists()


def test_shakespeare_config_is_the_default_run():
    config = parse_args(TrainConfig, ["--config", f"{ROOT}/configs/shakespeare.yaml"])
    assert config == TrainConfig()
