"""scripts/cli.py: flags, --config files, and the exit status and message of errors."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
import tyro

from gpt.errors import UserError
from scripts import cli


@dataclass
class Model:
    """Model settings."""

    n_head: int = 12  # heads
    n_embd: int = 768  # width

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}")


@dataclass
class Settings:
    """One field of each type that a command has."""

    runs: tyro.conf.Positional[list[str]] = field(default_factory=lambda: ["log"])  # runs
    model: Model = field(default_factory=lambda: Model(n_head=2))
    max_steps: int = 1000  # steps
    max_lr: float = 6e-4  # rate
    betas: tuple[float, float] = (0.9, 0.95)  # betas
    seq_len: int | Literal["auto"] = 256  # tokens
    prompts: list[str] = field(default_factory=lambda: ["\n"])  # prompts
    data: str | None = None  # file
    tensorboard: bool = False  # logs
    compile: bool | Literal["auto"] = "auto"  # compile


def parse(line):
    return cli.parse_args(Settings, line.split())


@pytest.mark.parametrize("line, name, value", [
    ("", "prompts", ["\n"]), ("--max_steps 3", "max_steps", 3),
    ("--betas 0.8 1", "betas", (0.8, 1.0)), ("--seq_len auto", "seq_len", "auto"),
    ("--seq_len 64", "seq_len", 64), ("--prompts a b", "prompts", ["a", "b"]),
    ("--data x --data None", "data", None), ("--tensorboard", "tensorboard", True),
    ("--tensorboard true", "tensorboard", True), ("--tensorboard True", "tensorboard", True),
    ("--tensorboard true --tensorboard false", "tensorboard", False),
    ("--compile true", "compile", True), ("--compile false", "compile", False),
    ("--compile true --compile auto", "compile", "auto"),
    ("a b --max_steps 3", "runs", ["a", "b"]), ("--model.n_embd 6", "model", Model(2, 6))])
def test_parse_args_reads_flags_of_every_type(line, name, value):
    assert getattr(parse(line), name) == value


@pytest.mark.parametrize("line", ["--config {} --max_steps 3 --prompts c --model.n_head 5",
                                  "log --max_steps 3 --prompts c --model.n_head 5 --config={}"])
def test_flags_override_yaml_of_every_type(line, tmp_path):
    """PyYAML reads 6e-5 as a string and a tuple as a list. The file alone has an invalid model."""
    path = tmp_path / "run.yaml"
    path.write_text("max_steps: 2\nmax_lr: 6e-5\nbetas: [0.8, 1]\nseq_len: auto\n"
                    "prompts: [a, 'b c']\ndata: null\ntensorboard: true\ncompile: false\n"
                    "model:\n  n_embd: 25\n")
    assert parse(line.format(path)) == Settings(
        ["log"], Model(5, 25), 3, 6e-5, (0.8, 1.0), "auto", ["c"], None, tensorboard=True,
        compile=False)
    assert parse(f"--config {path} --model.n_head 5").prompts == ["a", "b c"]


def exit_status(main, monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["command", *args])
    with pytest.raises(SystemExit) as ended:
        cli.run_cli(main, Settings)
    return ended.value.code


def failing(error):
    def main(config):
        raise error
    return main


@pytest.mark.parametrize("args, expected", [
    (["--max_step", "3"], ["--max_step", "--max_steps"]),
    (["--max_steps", "many"], ["--max_steps", "many"]),
    (["--betas", "0.9"], ["--betas", "2 values"]), (["--conf", "x"], ["--conf"]),
    (["--compile", "maybe"], ["--compile", "maybe", "auto"]),
    (["--tensorboard", "yes"], ["--tensorboard", "yes"]),
    (["--config", "run.yaml"], ["--model.n_heads", "--model.n_head"])])
def test_wrong_flag_or_key_or_value_exits_with_status_2(args, expected, monkeypatch, tmp_path,
                                                        capsys):
    """tyro's message names it and the valid alternatives."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("model: {n_heads: 3}")
    assert exit_status(lambda config: None, monkeypatch, *args) == 2
    message = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert all(word in message for word in expected)
    assert "\x1b" not in message and "Traceback" not in message


def test_run_cli_exits_with_the_status_of_main(monkeypatch, capfd):
    assert exit_status(lambda config: None, monkeypatch) is None
    assert exit_status(lambda config: config.max_steps, monkeypatch, "--max_steps", "7") == 7
    assert capfd.readouterr() == ("", "")
    assert exit_status(failing(KeyboardInterrupt()), monkeypatch) == 130
    assert capfd.readouterr() == ("", "interrupted\n")


def test_user_error_is_one_line_and_status_2(monkeypatch, capsys):
    assert exit_status(failing(UserError("x is 1: must be 2")), monkeypatch) == 2
    assert exit_status(lambda config: None, monkeypatch, "--model.n_head", "5") == 2
    assert capsys.readouterr().err == (
        "error: x is 1: must be 2\nerror: n_embd 768 is not divisible by n_head 5\n")


def test_every_rank_prints_a_wrong_flag(monkeypatch, capsys):
    """LOCAL_RANK can be left over from another launcher."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert exit_status(lambda config: None, monkeypatch, "--max_step", "3") == 2
    assert "--max_steps" in capsys.readouterr().err
