"""--help of every command: a line for each option that fits on the narrowest terminal."""

import re
from dataclasses import fields

import pytest

import prepare_shakespeare
from gpt.config import GPTConfig
from scripts import (
    bench,
    eval_hellaswag,
    eval_perplexity,
    export,
    generate,
    plot,
    prepare,
    train,
    train_tokenizer,
    validate,
)
from tests.conftest import ROOT, run

COMMANDS = {bench: bench.BenchConfig, eval_hellaswag: eval_hellaswag.HellaSwagConfig, export: export.ExportConfig,
            eval_perplexity: eval_perplexity.PerplexityConfig, generate: generate.GenerateConfig,
            prepare_shakespeare: prepare_shakespeare.PrepareConfig, plot: plot.PlotConfig,
            prepare: prepare.PrepareConfig, train: train.TrainConfig, train_tokenizer: train_tokenizer.TokenizerConfig,
            validate: validate.ValidateConfig}


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__)
def test_every_option_is_one_line_of_80_columns(module):
    """Flag, plain words, default: none longer, none left out, none without words."""
    shown = run(*["-m", module.__name__] if "." in module.__name__ else ["prepare_shakespeare.py"], "--help")
    assert shown.returncode == 0 and not shown.stderr
    assert max(map(len, shown.stdout.splitlines())) <= 80
    lines = dict(re.findall(r"^  --([\w.]+) +(\S.*)$", shown.stdout, re.MULTILINE))
    names = {each.name for each in fields(COMMANDS[module])}
    if issubclass(COMMANDS[module], train.TrainConfig):
        names = names - {"model"} | {f"model.{each.name}" for each in fields(GPTConfig)}
    assert lines.keys() == names | {"config", "print_config"}
    assert all(re.match(r"[^\[(]{4}", words) for words in lines.values())


def test_every_command_is_here():
    there = {path.stem for path in ROOT.glob("scripts/*.py")} - {"__init__", "command_line"}
    assert there | {"prepare_shakespeare"} == {module.__name__.removeprefix("scripts.") for module in COMMANDS}


def test_the_help_of_train_groups_its_options():
    """With the values that a run without flags has."""
    lines = run("-m", "scripts.train", "--help").stdout.splitlines()
    for line in ("Optimizer",
                 "  --max_lr              learning rate at the end of the warmup [0.0006]",
                 "  --model.n_layer       blocks [12]",
                 "  --betas               decay rates of AdamW's two averages [0.9, 0.95]",
                 "  --tensorboard         write files for TensorBoard to log_dir [false]",
                 "  --sample_prompts      beginnings of the sample texts ['\\n']"):
        assert line in lines
