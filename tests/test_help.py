"""--help of every command: each setting with its help text and default, in 80 columns."""

import ast
import inspect
import itertools
import re
from dataclasses import fields, is_dataclass

import pytest

import prepare_shakespeare
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
from scripts.cli import parse_args
from tests.conftest import ROOT, run

COMMANDS = {bench: bench.BenchConfig, eval_hellaswag: eval_hellaswag.HellaSwagConfig, export: export.ExportConfig,
            eval_perplexity: eval_perplexity.PerplexityConfig, generate: generate.GenerateConfig,
            prepare_shakespeare: prepare_shakespeare.PrepareConfig, plot: plot.PlotConfig,
            prepare: prepare.PrepareConfig, train: train.TrainConfig, train_tokenizer: train_tokenizer.TokenizerConfig,
            validate: validate.ValidateConfig}


def help_texts(config_class, prefix=""):
    """The comment or docstring of every field by its flag."""
    found = {}
    for cls in filter(is_dataclass, config_class.__mro__):
        for line, following in itertools.pairwise([*inspect.getsource(cls).splitlines(), ""]):
            if match := re.match(r"    (\w+): .*?(?:  # (.+))?$", line):
                found.setdefault(match[1], match[2] or following.strip())
    texts = {}
    for field in fields(config_class):
        if is_dataclass(field.type):
            texts |= help_texts(field.type, f"{field.name}.")
        else:
            text = found[field.name]
            texts[prefix + field.name] = ast.literal_eval(text) if text.startswith('"') else text
    return texts


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__)
def test_help_lists_every_setting(module, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        parse_args(COMMANDS[module], ["--help"])
    shown, error = capsys.readouterr()
    assert ended.value.code == 0 and not error
    assert max(map(len, shown.splitlines()[1:])) <= 80  # tyro does not wrap the first line, "usage: …"
    text = " ".join(shown.replace("│", " ").split())
    for flag, words in help_texts(COMMANDS[module]).items():
        assert f"--{flag} " in text or f"[{flag.upper()}]" in text  # a positional argument
        assert f"{words} (default: " in text or f"{words} (required)" in text
    assert "YAML file: --config FILE" in text


def test_help_in_a_pipe_has_no_escape_codes():
    done = run("prepare_shakespeare.py", "--help")
    assert done.returncode == 0 and not done.stderr
    assert "usage: python prepare_shakespeare.py" in done.stdout and "\x1b" not in done.stdout


def test_commands_are_complete():
    scripts = {path.stem for path in ROOT.glob("scripts/*.py")} - {"__init__", "cli"}
    assert scripts | {"prepare_shakespeare"} == {module.__name__.removeprefix("scripts.") for module in COMMANDS}
