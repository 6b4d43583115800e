"""configs/: every file is a run that begins, and every data set that one needs has a recipe."""

import pytest
import yaml

from gpt.dataloader import grad_accum_steps
from gpt.resolve import check_config as check_train
from scripts.cli import parse_args
from scripts.prepare import PrepareConfig
from scripts.prepare import check_config as check_prepare
from scripts.train import TrainConfig
from tests.conftest import ROOT, metrics, run

RUNS = sorted(ROOT.glob("configs/*.yaml"))
RECIPES = sorted(ROOT.glob("configs/data/*.yaml"))


def settings_of(path, config_class):
    return parse_args(config_class, ["--config", str(path)])


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


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_every_run_goes_some_steps(path, data_root, tmp_path):
    """By its name, on other text, one window a step; 124M and its like as a model of one block."""
    settings = yaml.safe_load(path.read_text())
    small = [] if settings.get("model", {}).get("n_embd", 768) <= 256 else [
        "--model.n_layer", 1, "--model.n_embd", 24, "--model.n_head", 2, "--init_from", "scratch"]
    done = run("-m", "scripts.train", "--config", path.relative_to(ROOT), "--data_root", data_root, "--log_dir",
               tmp_path, "--device", "cpu", "--micro_batch_size", 1, "--total_batch_size", settings["seq_len"],
               "--max_steps", 3, "--eval_tokens", settings["seq_len"], "--sample_tokens", 3, "--hellaswag_limit", 1,
               "--hellaswag_data", "tests/data/hellaswag.jsonl", *small)
    assert done.returncode == 0, done.stderr
    assert list(metrics(tmp_path, "train")) == [0, 1, 2] and list(metrics(tmp_path, "val")) == [3]
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    for name in ("warmup_steps", "weight_decay", "sample_prompts", "patience"):
        assert written[name] == settings.get(name, getattr(TrainConfig(), name)), name
    for prompt in settings.get("sample_prompts", []):
        assert f"--- sample at step 3 ---\n{prompt}" in (tmp_path / "samples.txt").read_text()


def test_the_recipes_people_know():
    """Their figures, as others have published them."""
    def model(name):
        config = settings_of(ROOT / "configs" / f"{name}.yaml", TrainConfig)
        return config, (config.seq_len, config.model.n_layer, config.model.n_head, config.model.n_embd,
                        config.model.dropout)

    shakespeare, _ = model("shakespeare")
    assert shakespeare == TrainConfig()
    stories, shape = model("tinystories")
    assert shape == (256, 4, 4, 256, 0.1) and stories.max_lr == 3e-4
    assert stories.sample_prompts == ["Once upon a time", "The little girl", "In a far away land"]
    wikitext, shape = model("wikitext2")
    assert shape == (128, 4, 4, 256, 0.1) and (wikitext.weight_decay, wikitext.patience) == (0.01, 2)
    assert (wikitext.warmup_steps, wikitext.max_steps) == (300, 3000)
    fineweb, shape = model("fineweb_edu_10B")
    assert shape == (1024, 12, 12, 768, 0.0) and fineweb.total_batch_size == 524288
    assert (fineweb.warmup_steps, fineweb.max_steps) == (715, 19073)
