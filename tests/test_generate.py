"""scripts/generate.py: the command as typed, and the prompt loop on a terminal."""

import codecs
import io
import os
import select
import subprocess
import sys
import time

import pytest
import torch

from gpt.checkpoint import save_model
from gpt.config import GPTConfig
from gpt.generation import generate_text
from gpt.model import GPT
from gpt.tokenizer import Tokenizer
from scripts import generate
from tests.conftest import ROOT, command, environment, run

CTRL_C, CTRL_D, ARROW_UP = "\x03", "\x04", "\x1b[A"
COMMAND = ("-m", "scripts.generate", "--device", "cpu", "--dtype", "float32", "--top_k", "5",
           "--log_dir")


@pytest.fixture(scope="module")
def model():
    """Return a model without `<|endoftext|>` in its vocabulary: its samples never end."""
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=32, vocab_size=50256, n_layer=2, n_head=2, n_embd=16))


@pytest.fixture(scope="module")
def log_dir(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    for step in (2, 3):
        save_model(folder / f"model_{step:05d}.pt", model, step=step, tokenizer="gpt2")
    return folder


def expected_texts(model, n_tokens, seed, n_samples=1):
    return generate_text(model, Tokenizer(), ["MENENIUS:"] * n_samples, n_tokens,
                         temperature=0.8, top_k=5, seed=seed)


def test_samples_go_to_stdout_and_the_checkpoint_to_stderr(model, log_dir):
    """40 tokens exceed the context of 32."""
    done = run(*COMMAND, log_dir, "--prompt", "MENENIUS:", "--num_samples", "2",
               "--max_new_tokens", "40")
    texts = expected_texts(model, 40, 1337, n_samples=2)
    assert done.stdout == "\n<|endoftext|>\n".join(texts) + "\n"
    assert done.stderr == f"{log_dir}/model_00003.pt: step 3\n" and done.returncode == 0


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, *args):
        self.keyboard, device = os.openpty()
        self.decoder, self.unread = codecs.getincrementaldecoder("utf-8")("replace"), ""
        self.process = subprocess.Popen(
            command(*map(str, args)), cwd=ROOT, preexec_fn=lambda: os.login_tty(device),
            env={**environment(), "TERM": "dumb", "INPUTRC": os.devnull})
        os.close(device)

    def type(self, keys):
        os.write(self.keyboard, keys.encode())

    def wait_for(self, text):
        """Read until `text` has appeared; what follows it stays unread."""
        deadline = time.monotonic() + 60
        while text not in self.unread:
            left = max(0, deadline - time.monotonic())
            assert select.select([self.keyboard], [], [], left)[0], self.unread
            self.unread += self.decoder.decode(os.read(self.keyboard, 4096)).replace("\r\n", "\n")
        self.unread = self.unread.partition(text)[2]


def test_prompt_loop_survives_ctrl_c_and_errors_until_ctrl_d(model, log_dir):
    """Prompt k uses seed + k. Samples are streamed."""
    pytest.importorskip("readline")
    terminal = Terminal(*COMMAND, log_dir, "--seed", "7", "--max_new_tokens", "1000000")
    terminal.wait_for("model_00003.pt: step 3\n"
                      "type a prompt, or Enter for none; Ctrl-C stops a sample, Ctrl-D exits\n> ")
    terminal.type("MENENIUS:\n")
    terminal.wait_for("MENENIUS:\n" + expected_texts(model, 20, seed=7)[0])
    terminal.type(CTRL_C)
    terminal.wait_for("\n> ")
    terminal.type("<|endoftext|>\n")
    terminal.wait_for("\nerror: prompt '<|endoftext|>' has token id 50256, "
                      "but the model's vocabulary has 50256 tokens: pass another prompt\n> ")
    terminal.type(ARROW_UP + ARROW_UP + "\n")
    terminal.wait_for("\n" + expected_texts(model, 20, seed=9)[0])
    terminal.type(CTRL_C)
    terminal.wait_for("\n> ")
    terminal.type(CTRL_D)
    assert terminal.process.wait(60) == 0
    os.close(terminal.keyboard)


def test_a_pipe_is_a_list_of_prompts(model, log_dir):
    """One a line; the texts can be told apart by the special token, which ends a sample."""
    done = subprocess.run(command(*map(str, [*COMMAND, log_dir, "--max_new_tokens", "10"])),
                          input=b"MENENIUS:\r\nMENENIUS:\ncaf\xe9\n", cwd=ROOT, env=environment(),
                          capture_output=True)
    texts = done.stdout.decode().split("\n<|endoftext|>\n")
    assert texts[0] == expected_texts(model, 10, seed=1337)[0], done.stderr
    assert texts[1] == expected_texts(model, 10, seed=1338)[0]
    assert len(texts) == 3 and texts[2].startswith("caf\ufffd")


@pytest.fixture
def calls(monkeypatch):
    """Record which of the two functions is called, with its prompt and dtype."""
    calls = []
    for name in ("run_interactive", "print_samples"):
        monkeypatch.setattr(generate, name, lambda config, model, tokenizer, name=name:
                            calls.append((name, config.prompt, str(model.wte.weight.dtype))))
    return calls


@pytest.mark.parametrize("terminals, called", [({0, 1}, "run_interactive"), ({0}, "print_samples"),
                                               ({1}, "print_samples"), (set(), "print_samples")])
def test_main_asks_for_prompts_only_on_a_terminal(log_dir, calls, monkeypatch, terminals, called):
    """Otherwise, without input, as under cron, the prompt is a newline."""
    monkeypatch.setattr(os, "isatty", terminals.__contains__)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    generate.main(generate.GenerateConfig(log_dir=str(log_dir), device="cpu", dtype="float32"))
    assert calls == [(called, "\n", "torch.float32")]


@pytest.mark.parametrize("dtype, precision, expected", [
    ("auto", "bf16", "bfloat16"), ("auto", "fp16", "float32"), ("float32", "bf16", "float32")])
def test_auto_dtype_is_bfloat16_if_native(
        log_dir, calls, monkeypatch, dtype, precision, expected):
    monkeypatch.setattr(generate, "select_precision", lambda name, device: precision)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    generate.main(generate.GenerateConfig(log_dir=str(log_dir), device="cpu", dtype=dtype,
                                          prompt="A"))
    assert calls == [("print_samples", "A", f"torch.{expected}")]
