"""scripts/generate.py: the command as typed, and the prompt loop on a terminal."""

import os
import select
import subprocess

import pytest
import torch

from gpt.checkpoint import save_model
from gpt.config import GPTConfig
from gpt.generation import generate_text
from gpt.model import GPT
from gpt.tokenizer import Tokenizer
from tests.conftest import ROOT, command, environment, run

CTRL_C, CTRL_D, ARROW_UP = "\x03", "\x04", "\x1b[A"


@pytest.fixture(scope="module")
def model():
    """Return a model without `<|endoftext|>` in its vocabulary: its samples never end."""
    torch.manual_seed(0)
    return GPT(GPTConfig(block_size=32, vocab_size=50256, n_layer=2, n_head=2, n_embd=16))


@pytest.fixture(scope="module")
def words(model, tmp_path_factory):
    """Return the command for a checkpoint of this model."""
    path = tmp_path_factory.mktemp("log") / "model_00003.pt"
    save_model(path, model, step=3, tokenizer="gpt2")
    return ["-m", "scripts.generate", "--checkpoint", path, "--device", "cpu", "--dtype", "float32",
            "--top_k", 5, "--max_new_tokens"]


def expected_texts(model, n_tokens, seed, prompt="MENENIUS:", n_samples=1):
    return generate_text(model, Tokenizer(), [prompt] * n_samples, n_tokens, temperature=0.8,
                         top_k=5, seed=seed)


def test_samples_go_to_stdout_and_the_checkpoint_to_stderr(model, words):
    """40 tokens exceed the context of 32."""
    done = run(*words, 40, "--prompt", "MENENIUS:", "--num_samples", 2)
    texts = expected_texts(model, 40, 1337, n_samples=2)
    assert done.stdout == "\n<|endoftext|>\n".join(texts) + "\n"
    assert done.stderr.endswith("model_00003.pt: step 3\n") and done.returncode == 0


def test_without_a_prompt_or_input_a_newline_is_continued(model, words):
    """As under cron."""
    assert run(*words, 5).stdout == expected_texts(model, 5, 1337, "\n")[0] + "\n"


def test_a_pipe_is_a_list_of_prompts(model, words):
    """One a line; the texts can be told apart by the special token, which ends a sample."""
    done = subprocess.run(command(*words, 10), input=b"MENENIUS:\r\nMENENIUS:\ncaf\xe9\n", cwd=ROOT,
                          env=environment(), capture_output=True)
    first, second, third = done.stdout.decode().split("\n<|endoftext|>\n")
    assert first == expected_texts(model, 10, seed=1337)[0]
    assert second == expected_texts(model, 10, seed=1338)[0]
    assert third.startswith("caf\ufffd")


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, *words):
        self.keyboard, device = os.openpty()
        self.unread = b""
        self.process = subprocess.Popen(
            command(*words), cwd=ROOT, preexec_fn=lambda: os.login_tty(device),
            env={**environment(), "TERM": "dumb", "INPUTRC": os.devnull})
        os.close(device)

    def type(self, keys):
        os.write(self.keyboard, keys.encode())

    def wait_for(self, text):
        """Read until `text` has appeared; what follows it stays unread."""
        while text.encode() not in self.unread:
            is_ready, _, _ = select.select([self.keyboard], [], [], 60)
            assert is_ready and len(self.unread) < 10**5, self.unread
            self.unread = (self.unread + os.read(self.keyboard, 4096)).replace(b"\r\n", b"\n")
        self.unread = self.unread.partition(text.encode())[2]


def test_prompt_loop_survives_ctrl_c_and_errors_until_ctrl_d(model, words, request):
    """Prompt k uses seed + k. Samples are streamed. Arrows select earlier prompts."""
    pytest.importorskip("readline")
    terminal = Terminal(*words, 10**6, "--seed", 7)
    request.addfinalizer(terminal.process.kill)
    terminal.wait_for("type a prompt, or Enter for none; Ctrl-C stops a sample, Ctrl-D exits\n> ")
    terminal.type("MENENIUS:\n")
    terminal.wait_for("MENENIUS:\n" + expected_texts(model, 20, seed=7)[0])
    terminal.type(CTRL_C)
    terminal.wait_for("\n> ")
    terminal.type("<|endoftext|>\n")
    terminal.wait_for("\nerror: prompt '<|endoftext|>' has token id 50256")
    terminal.wait_for("\n> ")
    terminal.type(ARROW_UP + ARROW_UP + "\n")
    terminal.wait_for("\n" + expected_texts(model, 20, seed=9)[0])
    terminal.type(CTRL_C)
    terminal.wait_for("\n> ")
    terminal.type(CTRL_D)
    assert terminal.process.wait(60) == 0
    os.close(terminal.keyboard)
