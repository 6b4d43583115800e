"""configs/: every file is a run that begins, and every data set that one needs has a recipe."""

import jsonargparse
import pytest
import yaml

from gpt.dataloader import grad_accum_steps
from scripts.prepare import PrepareConfig
from scripts.prepare import check as check_prepare
from scripts.train import TrainConfig
from scripts.train import check as check_train
from tests.conftest import ROOT

RUNS = sorted(ROOT.glob("configs/*.yaml"))
RECIPES = sorted(ROOT.glob("configs/data/*.yaml"))


def settings_of(path, config_class):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(config_class)
    settings = vars(parser.instantiate(parser.parse_args(["--config", str(path)])))
    settings.pop("config")
    return config_class(**settings)


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_run_has_settings_that_go_together(path, tmp_path):
    """A recipe with a typing error is found out after hours of downloading."""
    config = settings_of(path, TrainConfig)
    config.log_dir = str(tmp_path)
    check_train(config)
    steps = grad_accum_steps(config.total_batch_size, config.micro_batch_size, config.seq_len, 1)
    tokens = steps * config.micro_batch_size * config.seq_len
    assert tokens == config.total_batch_size and config.warmup_steps < config.max_steps
    made = [yaml.safe_load(recipe.read_text())["out"] for recipe in RECIPES]
    assert config.data_root in [*made, "shakespeare_data", "shakespeare_data/bpe2048"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_says_what_to_fetch_and_has_a_run(path):
    config = settings_of(path, PrepareConfig)
    check_prepare(config)
    assert config.dataset and not config.input
    assert (ROOT / "configs" / path.name).exists()
