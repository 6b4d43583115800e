"""--help of every command: each setting with its help text and default, in 80 columns."""

import importlib
import inspect
import re
from dataclasses import fields, is_dataclass

import pytest

from scripts.cli import parse_args
from tests.conftest import ROOT

COMMANDS = ["prepare_shakespeare"] + [f"scripts.{path.stem}" for path in sorted(ROOT.glob("scripts/[!_]*.py"))
                                      if path.stem != "cli"]


def help_texts(config_class, prefix=""):
    """Return the comment behind every field, by its flag."""
    sources = "".join(inspect.getsource(cls) for cls in config_class.__mro__ if is_dataclass(cls))
    comments = dict(re.findall(r"^    (\w+): .*  # (.+)$", sources, re.MULTILINE))
    texts = {}
    for field in fields(config_class):
        if is_dataclass(field.type):
            texts |= help_texts(field.type, f"{field.name}.")
        else:
            texts[prefix + field.name] = comments[field.name]
    return texts


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_setting(name, capsys, monkeypatch):
    """A field without a comment is a KeyError."""
    monkeypatch.setenv("COLUMNS", "80")
    module = importlib.import_module(name)
    config_class, = (value for key, value in vars(module).items() if key.endswith("Config")
                     and value.__module__ == name)
    with pytest.raises(SystemExit) as ended:
        parse_args(config_class, ["--help"])
    shown, error = capsys.readouterr()
    assert ended.value.code == 0 and not error and "\x1b" not in shown
    assert max(map(len, shown.splitlines()[1:])) <= 80  # tyro does not wrap the first line, "usage: …"
    text = " ".join(shown.replace("│", " ").split())
    for flag, words in help_texts(config_class).items():
        assert f"--{flag} " in text or f"[{flag.upper()}]" in text  # a positional argument
        assert f"{words} (default: " in text or f"{words} (required)" in text
    assert "YAML file: --config FILE" in text
