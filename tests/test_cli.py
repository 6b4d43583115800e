"""scripts/cli.py: flags, --config files, and the exit status and message of errors."""

import sys
from pathlib import Path

import pytest

from gpt.config import GPTConfig
from scripts import cli
from scripts.train import TrainConfig
from tests.conftest import Fork


def parse(line):
    return cli.parse_args(TrainConfig, line.split())


def test_switches_are_read_as_in_yaml_and_python():
    """The last flag counts, as when a command is typed again with changes."""
    config = parse("--tensorboard --compile True --deterministic true --deterministic False")
    assert config.tensorboard is config.compile is True
    assert config.deterministic is False


def test_tilde_is_the_home_folder():
    assert parse("--hellaswag_data ~/data").hellaswag_data == str(Path.home() / "data")


def test_flags_override_yaml_of_every_type(tmp_path):
    """PyYAML reads 6e-5 as a string and a tuple as a list. The file alone has an invalid model."""
    path = tmp_path / "run.yaml"
    path.write_text("max_steps: 2\nmax_lr: 6e-5\nbetas: [0.8, 0]\nseq_len: auto\n"
                    "sample_prompts: [a, '--x', '-1']\nhellaswag_data: null\ntensorboard: true\n"
                    "compile: false\nmodel:\n  n_embd: 25\n")
    assert parse(f"--max_steps 3 --model.n_head 5 --config {path}") == TrainConfig(
        model=GPTConfig(0, 0, n_head=5, n_embd=25), max_steps=3, max_lr=6e-5, betas=(0.8, 0.0),
        seq_len="auto", sample_prompts=["a", "--x", "-1"], hellaswag_data=None, tensorboard=True,
        compile=False)


@pytest.mark.parametrize("flags, named", [
    ("--max_step 3", "--max_steps"), ("--compile maybe", "maybe"),
    ("--config {}/run.yaml", "--model.n_heads")])
def test_wrong_flag_or_key_or_value_exits_with_status_2(flags, named, tmp_path):
    """Also if another launcher has left its LOCAL_RANK."""
    (tmp_path / "run.yaml").write_text("model: {n_heads: 3}")
    flags = flags.format(tmp_path).split()
    done = Fork("-m", "scripts.train", *flags, LOCAL_RANK=1).result()
    assert done.returncode == 2
    assert named in done.stderr and "Traceback" not in done.stderr


def test_ctrl_c_ends_a_command_without_a_traceback(monkeypatch, capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(SystemExit, match="130"):
        cli.run_cli(interrupted, TrainConfig)
    assert capsys.readouterr() == ("", "interrupted\n")
