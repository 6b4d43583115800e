"""scripts/cli.py: flags, --config files, and how errors end a command."""

import os
from dataclasses import dataclass, field
from typing import Literal

import pytest
import tyro
import yaml

from gpt.errors import UserError
from scripts import cli


@dataclass
class Model:
    """Model settings."""

    n_head: int = 12
    """heads"""
    n_embd: int = 768
    """width"""

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")


@dataclass
class Settings:
    """One field of each type that a command has."""

    runs: tyro.conf.Positional[list[str]] = field(default_factory=lambda: ["log"])
    """runs"""
    model: Model = field(default_factory=lambda: Model(n_head=2))
    """model"""
    max_steps: int = 1000
    """steps"""
    max_lr: float = 6e-4
    """rate"""
    betas: tuple[float, float] = (0.9, 0.95)
    """betas"""
    seq_len: int | Literal["auto"] = 256
    """tokens"""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """name"""
    prompts: list[str] = field(default_factory=lambda: ["\n"])
    """prompts"""
    data: str | None = None
    """file"""
    tensorboard: bool = False
    """logs"""
    compile: bool | Literal["auto"] = "auto"
    """compile"""


def parse(line, config_class=Settings):
    return cli.parse_args(config_class, line.split())


@pytest.mark.parametrize("line, name, value", [
    ("", "betas", (0.9, 0.95)), ("--max_steps 3", "max_steps", 3), ("--max-steps 3", "max_steps", 3),
    ("--max_steps=3", "max_steps", 3), ("--max_steps 3 --max_steps 4", "max_steps", 4),
    ("--max_lr -1e-3", "max_lr", -1e-3), ("--betas 0.8 1", "betas", (0.8, 1.0)), ("--seq_len auto", "seq_len", "auto"),
    ("--seq_len 64", "seq_len", 64), ("--optimizer muon", "optimizer", "muon"), ("--data x", "data", "x"),
    ("--data x --data None", "data", None), ("--tensorboard true", "tensorboard", True),
    ("--tensorboard True", "tensorboard", True), ("--tensorboard", "tensorboard", True),
    ("--tensorboard false", "tensorboard", False),
    ("--compile true", "compile", True), ("--compile false", "compile", False), ("--compile auto", "compile", "auto"),
    ("--prompts a b", "prompts", ["a", "b"]), ("--prompts a b --prompts c", "prompts", ["c"]),
    ("--prompts", "prompts", []), ("--prompts=-a", "prompts", ["-a"]), ("--max_steps 3 a b", "runs", ["a", "b"]),
    ("a b --max_steps 3", "runs", ["a", "b"]), ("--model.n_embd 6", "model", Model(2, 6))])
def test_flags(line, name, value):
    assert getattr(parse(line), name) == value


def test_yaml_values(tmp_path):
    """PyYAML reads 6e-4 as a string and a tuple as a list."""
    path = tmp_path / "run.yaml"
    path.write_text("max_lr: 6e-4\nbetas: [0.8, 1]\nseq_len: auto\nprompts: [a, 'b c']\ndata: null\n"
                    "tensorboard: true\ncompile: false\nmodel:\n  n_head: 4\n")
    assert parse(f"--config {path}") == Settings(
        ["log"], Model(4, 768), 1000, 6e-4, (0.8, 1.0), "auto", "adamw", ["a", "b c"], None, True, False)


@pytest.mark.parametrize("line", ["--config {} --max_steps 3 --prompts c --model.n_head 5",
                                  "--max_steps 3 --prompts c --model.n_head 5 --config={}",
                                  "--max_steps 3 --config {} --prompts c --model.n_head 5"])
def test_flags_override_yaml(line, tmp_path):
    """Also where the model of the file alone is invalid: 7 is not divisible by 2."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"max_steps": 2, "prompts": ["a", "b"], "optimizer": "muon",
                                    "model": {"n_embd": 25}}))
    assert parse(line.format(path)) == Settings(
        model=Model(5, 25), max_steps=3, optimizer="muon", prompts=["c"])


def test_later_config_file_wins(tmp_path):
    for name, text in (("a", "max_steps: 1\nseq_len: 8"), ("b", "max_steps: 2"), ("empty", "")):
        (tmp_path / name).write_text(text)
    config = parse(f"--config {tmp_path}/a --config {tmp_path}/b --config {tmp_path}/empty")
    assert (config.max_steps, config.seq_len) == (2, 8)


@pytest.mark.parametrize("text, message", [
    ("- a", "has no settings"), ("a: [", "is not a YAML file"), ("\0", "is not a YAML file"), (None, "No such file")])
def test_a_config_that_is_no_yaml_file_is_refused(text, message, tmp_path):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as error:
        parse(f"--config {path}")
    assert f"--config {path}" in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text, words", [
    ("max_step: 3", ["--max_step", "--max_steps"]), ("model: {n_heads: 3}", ["--model.n_heads", "--model.n_head"]),
    ("max_steps: 1e3", ["--max_steps", "1e3"]), ("max_steps: null", ["--max_steps", "None"]),
    ("betas: [0.9]", ["--betas", "2 values"]), ("compile: 1", ["--compile", "1"])])
def test_wrong_settings_in_a_config_are_tyros_messages(text, words, tmp_path, capsys):
    """As for flags: a file stands for the flags that say the same."""
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit) as ended:
        parse(f"--config {tmp_path}/run.yaml")
    assert ended.value.code == 2 and all(word in capsys.readouterr().err for word in words[:1])


def test_config_needs_a_file():
    with pytest.raises(UserError, match="--config: expected one argument"):
        parse("--max_steps 3 --config")


@pytest.mark.parametrize("line, words", [
    ("--max_step 3", ["--max_step", "--max_steps"]), ("--max_steps many", ["--max_steps", "many"]),
    ("--max_steps", ["--max_steps"]), ("--betas 0.9", ["--betas", "2 values"]), ("--conf x", ["--conf"]),
    ("--compile maybe", ["--compile", "maybe", "auto"]), ("--optimizer sgd", ["--optimizer", "sgd", "adamw", "muon"]),
    ("--seq_len long", ["--seq_len", "long"]), ("--tensorboard yes", ["--tensorboard", "yes"])])
def test_wrong_flags_are_tyros_messages(line, words, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(line)
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert ended.value.code == 2 and all(word in message for word in words) and "\x1b" not in message


def test_required_flag(capsys):
    @dataclass
    class Required:
        out: str
        """output folder"""

    with pytest.raises(SystemExit):
        parse("", Required)
    assert "--out" in capsys.readouterr().err
    assert parse("--out x", Required).out == "x"


def status_of(main, monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["command", *args])
    with pytest.raises(SystemExit) as ended:
        cli.run_cli(main, Settings)
    return ended.value.code


def failing(error):
    def main(config):
        raise error
    return main


def test_exit_status(monkeypatch, capfd):
    assert status_of(lambda config: None, monkeypatch) is None
    assert status_of(lambda config: config.max_steps, monkeypatch, "--max_steps", "7") == 7
    assert capfd.readouterr() == ("", "")
    assert status_of(failing(KeyboardInterrupt()), monkeypatch) == 130
    assert capfd.readouterr() == ("", "interrupted\n")


def test_user_error_is_one_line(monkeypatch, capsys):
    assert status_of(failing(UserError("x is 1: must be 2")), monkeypatch) == 2
    assert status_of(lambda config: None, monkeypatch, "--model.n_head", "5") == 2
    assert capsys.readouterr().err == "error: x is 1: must be 2\nerror: n_embd 768 is not divisible by n_head 5\n"


@pytest.mark.parametrize("args", [["--max_step", "3"], ["--max_steps", "many"], ["--optimizer", "sgd"], ["--help"]])
def test_other_ranks_are_silent(args, monkeypatch, capsys):
    """They wait until torchrun, which has seen local rank 0 exit, stops them."""
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    monkeypatch.setitem(os.environ, "LOCAL_RANK", "1")
    assert status_of(lambda config: None, monkeypatch, *args) == (0 if args == ["--help"] else 2)
    assert capsys.readouterr() == ("", "") and slept == ([] if args == ["--help"] else [10])


def test_errors_of_other_ranks_have_their_number(monkeypatch, capsys):
    """An error that local rank 0 does not have: it is still there after the wait."""
    slept = []
    monkeypatch.setattr("time.sleep", slept.append)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setitem(os.environ, name, "1")
    assert status_of(failing(UserError("no disk")), monkeypatch) == 2
    assert capsys.readouterr().err == "error (rank 1): no disk\n" and slept == [10]
