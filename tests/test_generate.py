"""scripts/generate.py, as typed."""

import codecs
import os
import select
import shutil
import subprocess
import time

import pytest
import torch

from gpt.device import select_precision
from gpt.generation import generate_text
from scripts import cli
from scripts import generate as script
from tests.conftest import ROOT, Fork, assert_refused, command, environment, run, start, train, workers

CTRL_C, CTRL_D, ARROW_UP = "\x03", "\x04", "\x1b[A"
DTYPE = "bfloat16" if select_precision("auto", torch.device("cpu")) == "bf16" else "float32"
USAGE = "type a prompt, or Enter for none; Ctrl-C stops a text, Ctrl-D leaves\n"


@pytest.fixture(scope="module")
def log_dir(data_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train(data_root, folder, "--max_steps", "3", "--save_every", "1", "--eval_every", "0", "--sample_every", "0")
    return folder


def generate(log_dir, *words):
    done = run("-m", "scripts.generate", "--log_dir", log_dir, "--device", "cpu", "--max_new_tokens", "40", *words)
    assert done.returncode == 0, done.stderr
    return done


class Terminal:
    """What a person at a terminal types and sees; once there is a command, a shell on it runs that and leaves."""

    def __init__(self):
        self.person, self.device = os.openpty()
        self.decoder, self.unread, self.shell = codecs.getincrementaldecoder("utf-8")("replace"), "", None

    def start(self, *words):
        """Run the command and then say its status and whether it left the terminal as it was."""
        script = 'trap : INT; before=$(stty -g); "$@"; echo "left with $?"; [ "$before" = "$(stty -g)" ] && echo sane'
        self.shell = subprocess.Popen(["sh", "-c", script, "sh", *command(*map(str, words))], cwd=ROOT,
                                      env={**environment(), "TERM": "dumb", "INPUTRC": os.devnull},
                                      preexec_fn=lambda: os.login_tty(self.device))

    def type(self, keys):
        os.write(self.person, keys.encode())

    def rest(self):
        """Wait until the command waits for keys: a Ctrl-C while readline still draws the last one is lost on Python."""
        pid, = workers(self.shell.pid)
        while subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True).stdout[:1] in (b"R", b"D"):
            time.sleep(0.01)

    def until(self, end):
        """What appears from here on, up to and with `end`."""
        deadline = time.monotonic() + 60
        while end not in (text := self.unread.replace("\r\n", "\n")):
            assert select.select([self.person], [], [], max(0, deadline - time.monotonic()))[0], f"no {end!r}: {text!r}"
            self.unread += self.decoder.decode(os.read(self.person, 4096))
        seen, end, self.unread = text.partition(end)
        return seen + end

    def close(self):
        os.close(self.device)
        os.close(self.person)  # the end of a terminal is the end of what runs on it
        if self.shell:
            self.shell.wait(60)


@pytest.fixture
def terminal():
    it = Terminal()
    yield it
    it.close()


def test_a_terminal_asks_for_prompts_until_ctrl_d(log_dir, tmp_path, terminal):
    """Each is continued as by --prompt, with the next seed; one that the model cannot read does not end the session."""
    content = torch.load(log_dir / "model_00003.pt")
    content["model"]["wte.weight"] = content["model"]["wte.weight"][:50256].clone()
    content["config"]["vocab_size"] = 50256  # all tokens but <|endoftext|>
    torch.save(content, tmp_path / "model.pt")
    words = ("--checkpoint", tmp_path / "model.pt", "--num_samples", "2")
    first = generate(log_dir, *words, "--prompt", "MENENIUS:").stdout
    empty = generate(log_dir, *words, "--prompt", "\n", "--seed", "1338").stdout
    assert first.count("\n---\n") == 1
    terminal.start("-m", "scripts.generate", "--device", "cpu", "--max_new_tokens", "40", *words)
    assert terminal.until("> ") == f"{tmp_path}/model.pt: step 3, {DTYPE}\n{USAGE}> "
    refusal = "error: prompt '<|endoftext|>' has token 50256: the model knows 50256 tokens\n"
    for line, answer in (("MENENIUS:\n", first), ("\n", empty), ("<|endoftext|>\n", refusal)):
        terminal.type(line)
        assert terminal.until(answer + "> ") == line + answer + "> "
    terminal.type(CTRL_D)
    assert terminal.until("sane\n") == "\nleft with 0\nsane\n"


def test_ctrl_c_ends_a_text_and_arrow_up_brings_its_prompt_back(log_dir, terminal):
    """At the prompt Ctrl-C gives a fresh one, which takes no seed: nobody has to wait for the model to load again."""
    pytest.importorskip("readline")
    terminal.start("-m", "scripts.generate", "--device", "cpu", "--log_dir", log_dir, "--max_new_tokens", "1000000")
    terminal.until(USAGE + "> ")
    for keys, seed in (("MENENIUS:", 1337), (ARROW_UP, 1338)):
        terminal.type(keys + "\n")
        beginning = generate(log_dir, "--prompt", "MENENIUS:", "--seed", str(seed)).stdout.removesuffix("\n")
        assert terminal.until(beginning) == "MENENIUS:\n" + beginning  # as it is written, long before its end
        terminal.type(CTRL_C)
        terminal.until("\n> ")
        terminal.type("no, not")
        terminal.until("no, not")
        terminal.rest()
        terminal.type(CTRL_C)
        terminal.until("\n> ")
    terminal.type(CTRL_D)
    assert terminal.until("sane\n") == "\nleft with 0\nsane\n"


def test_nobody_is_asked_without_a_keyboard(log_dir, terminal):
    """In a pipe or under cron a newline is continued, once; also if a person is watching."""
    once = generate(log_dir)
    assert once.stdout == generate(log_dir, "--prompt", "\n").stdout and once.stdout.startswith("\n")
    watched = Fork("-m", "scripts.generate", "--log_dir", log_dir, "--device", "cpu", "--max_new_tokens", "40",
                   stdout=os.ttyname(terminal.device))
    assert terminal.until(once.stdout) == once.stdout and watched.wait(60) == 0


def test_it_takes_the_newest_checkpoint_and_says_which(log_dir):
    """Only the text goes to standard output; 40 tokens go beyond the context of 32."""
    done = generate(log_dir, "--prompt", "MENENIUS:")
    assert done.stdout.startswith("MENENIUS:") and len(done.stdout) > 60
    assert done.stderr == f"{log_dir}/model_00003.pt: step 3, {DTYPE}\n"


def test_the_same_seed_writes_the_same_text(log_dir):
    """And another one, from another checkpoint, another text; greedy texts are all the same."""
    first = generate(log_dir, "--num_samples", "2").stdout
    assert first.count("\n---\n") == 1 and len(set(first.split("\n---\n"))) == 2
    assert generate(log_dir, "--num_samples", "2").stdout == first
    other = generate(log_dir, "--num_samples", "2", "--seed", "1", "--checkpoint", log_dir / "model_00001.pt",
                     "--dtype", "float32")
    assert other.stdout != first and other.stderr.endswith("step 1, float32\n")
    done = generate(log_dir, "--temperature", "0", "--num_samples", "2", "--dtype", "bfloat16")
    greedy = done.stdout.removesuffix("\n").split("\n---\n")
    assert len(greedy) == 2 and greedy[0] == greedy[1] and done.stderr.endswith("step 3, bfloat16\n")


@pytest.mark.parametrize("dtype, precision, expected", [("auto", "bf16", torch.bfloat16),
                                                        ("auto", "fp16", torch.float32),
                                                        ("auto", "float32", torch.float32),
                                                        ("float32", "bf16", torch.float32),
                                                        ("bfloat16", "float32", torch.bfloat16)])
def test_auto_takes_bfloat16_where_the_device_computes_it(log_dir, monkeypatch, capsys, dtype, precision, expected):
    """In float32 the text is that of the plain model."""
    dtypes = []
    print_samples = script.print_samples
    monkeypatch.setattr(script, "select_precision", lambda name, device: precision)
    monkeypatch.setattr(script, "print_samples", lambda config, model, tokenizer: (
        dtypes.append(model.wte.weight.dtype), print_samples(config, model, tokenizer)))
    config = script.GenerateConfig(log_dir=str(log_dir), device="cpu", dtype=dtype, prompt="A", max_new_tokens=20)
    script.main(config)
    printed = capsys.readouterr()
    assert dtypes == [expected] and printed.err.endswith(f", {str(expected).removeprefix('torch.')}\n")
    if expected == torch.float32:
        _, model, tokenizer = cli.load_model(config, torch.device("cpu"))
        text, = generate_text(model, tokenizer, ["A"], 20, temperature=0.8, top_k=200, seed=1337)
        assert printed.out == text + "\n"


def test_a_reader_that_has_seen_enough(log_dir, terminal):
    """`| head -0` on a terminal: no traceback, and nothing is asked of a person who is shown nothing."""
    process = start("-m", "scripts.generate", "--device", "cpu", "--log_dir", log_dir, stdin=terminal.device,
                    stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == f"{log_dir}/model_00003.pt: step 3, {DTYPE}\n"
    assert process.wait() == 141


def test_a_damaged_newest_checkpoint_is_passed_over(log_dir, tmp_path):
    """With its name, so that nobody wonders."""
    copy = shutil.copytree(log_dir, tmp_path / "copy")
    newest = copy / "model_00003.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    done = generate(copy)
    assert "model_00003.pt is damaged" in done.stderr and "model_00002.pt: step 2" in done.stderr
    assert_refused(run("-m", "scripts.generate", "--checkpoint", newest), "model_00003.pt is damaged")
