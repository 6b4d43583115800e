"""gpt/hellaswag.py against the reference implementation, in training and as a command."""

import base64
import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from benchmarks import reference_hellaswag
from benchmarks.reference_hellaswag import make_examples
from gpt.config import GPTConfig
from gpt.distributed import Ranks
from gpt.errors import UserError
from gpt.hellaswag import Example, evaluate_hellaswag, load_examples, pack_example, score_endings
from gpt.model import GPT
from gpt.tokenizer import Tokenizer
from tests.conftest import TINY, Fork, assert_user_error, metrics, run

DATA = Path(__file__).parent / "data" / "hellaswag.jsonl"  # our own examples in the original format
# A byte-level tokenizer is fast, and its sequences are four times as long.
BYTES = Tokenizer("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))


def make_model(block_size=1024, std=0.5):  # std: large enough that every key and position matters
    torch.manual_seed(0)
    config = GPTConfig(block_size=block_size, vocab_size=257, n_layer=2, n_head=4, n_embd=48,
                       dropout=0.1)
    model = GPT(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


# One example fits into exactly 100 positions, another needs exactly 300.
@pytest.mark.parametrize("block_size, rows", [(1024, {1}), (299, {1, 4}), (100, {1, 4}),
                                              (12, {4}), (1, {4})])
@pytest.mark.parametrize("batch_tokens", [1, 4000])
def test_score_endings_equals_the_reference(block_size, rows, batch_tokens):
    """Packed rows give the losses and choices of one ending per row,
    also with truncated contexts and endings."""
    model, examples = make_model(block_size), load_examples(str(DATA)) + make_examples(12)
    assert {len(pack_example(0, example, BYTES, model.config)) for example in examples} == rows
    *_, (sums, counts) = score_endings(model, BYTES, examples, batch_tokens)
    scores = torch.stack([sums, sums / counts])
    expected = reference_hellaswag.score_endings(model, BYTES, examples)
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(scores.argmin(2), expected.argmin(2))
    assert len(expected.argmin(2).unique()) > 1


def test_score_endings_is_close_in_bfloat16():
    """Losses are close to float32 but not equal, so autocast is active."""
    model, examples = make_model(std=0.02), make_examples(12)
    with torch.autocast("cpu", torch.bfloat16):
        *_, (sums, _) = score_endings(model, BYTES, examples, 4000)
    expected = reference_hellaswag.score_endings(model, BYTES, examples)[0]
    torch.testing.assert_close(sums, expected, rtol=1e-2, atol=0)
    assert (sums != expected).any(1).all()


def test_evaluate_hellaswag_returns_accuracy_and_standard_error():
    """The fraction of the reference's choices that equal the labels,
    and the standard error of a proportion."""
    model, examples = make_model(), make_examples(30)
    labels = torch.tensor([example.label for example in examples])
    choices = reference_hellaswag.score_endings(model, BYTES, examples).argmin(2)
    acc, acc_norm = (choices == labels).double().mean(1).tolist()
    model.train()  # must make no difference
    result = evaluate_hellaswag(model, BYTES, examples, Ranks(0, 1, torch.device("cpu")))
    assert result == pytest.approx({
        "examples": 30, "acc": acc, "acc_stderr": math.sqrt(acc * (1 - acc) / 29),
        "acc_norm": acc_norm, "acc_norm_stderr": math.sqrt(acc_norm * (1 - acc_norm) / 29)})
    assert model.training


@pytest.mark.parametrize("stopped", [0, 1])
def test_rank_without_examples_returns_the_global_result(stopped):
    """With a single example, rank 1 of 2 scores none;
    if only rank 0 got a signal, rank 1 stops too."""
    ranks = Ranks(1, 2, torch.device("cpu"))
    other_rank = [1, 0, 1, stopped]
    ranks.mean = lambda *mine: [(a + b) / 2 for a, b in zip(other_rank, mine, strict=True)]
    result = evaluate_hellaswag(make_model(), BYTES, make_examples(1), ranks)
    accuracies = {"examples": 1, "acc": 1, "acc_stderr": 0, "acc_norm": 0, "acc_norm_stderr": 0}
    assert result == (None if stopped else accuracies)


@pytest.fixture(scope="module")
def log_dir(data_root, tmp_path_factory):
    """Return the log_dir of a run that SIGTERM stopped during an evaluation
    and that was then resumed."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "many.jsonl").write_text(DATA.read_text() * 2000)  # takes more than a minute
    args = ["-m", "scripts.train", "--data_root", data_root, "--log_dir", folder, *TINY,
            "--max_steps", "5", "--sample_every", "0", "--eval_every", "2",
            "--hellaswag_every", "2", "--hellaswag_data"]
    process = Fork(*args, folder / "many.jsonl")
    while (not (folder / "metrics.jsonl").exists()
           or not metrics(folder, "val")):  # the last line before HellaSwag
        assert process.wait(0.1) is None
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(20) == 143
    assert (folder / "model_00002.pt").exists() and not metrics(folder, "hellaswag")
    done = run(*args, DATA)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("command", [
    ["-m", "scripts.eval_hellaswag"],
    ["torchrun", "--standalone", "--nproc_per_node=2", "scripts/eval_hellaswag.py"]])
def test_eval_hellaswag_equals_evaluation_in_training(log_dir, command):
    """Training evaluates at every due step, the interrupted one too;
    the command agrees, also on two ranks."""
    records = metrics(log_dir, "hellaswag")
    assert sorted(records) == [2, 4, 5]
    done = run(*command, "--log_dir", log_dir, "--data", DATA, "--device", "cpu",
               "--precision", "float32")
    assert done.returncode == 0 and "8 examples | acc " in done.stdout, done.stderr
    assert json.loads((log_dir / "hellaswag.json").read_text()) == {
        "checkpoint": str(log_dir / "model_00005.pt"), "data": str(DATA), "precision": "float32",
        **{name: value for name, value in records[5].items() if name not in ("step", "split")}}
    (log_dir / "hellaswag.json").unlink()


def test_eval_hellaswag_without_network_names_the_flag(tmp_path):
    done = Fork("-m", "scripts.eval_hellaswag", HF_HUB_OFFLINE=1, HF_HOME=tmp_path).result()
    assert_user_error(done, "Rowan/hellaswag cannot be read", "hellaswag_val.jsonl", "--data")


def test_load_examples_reads_the_original_format(tmp_path):
    """Also with labels as text, as the hub has them, a byte order mark,
    and a line separator within a text."""
    examples = load_examples(str(DATA))
    assert len(examples) == 8
    assert [example.label for example in examples] == [0, 2, 1, 0, 3, 1, 2, 3]
    assert examples[0].context == "A man turns a bicycle upside down on the lawn. he"
    assert load_examples(str(DATA), limit=3) == examples[:3]
    (tmp_path / "one.jsonl").write_text(
        '\ufeff{"ctx": "a\u2028", "endings": ["b", "c", "d", "e"], "label": "1"}\n\n')
    assert load_examples(str(tmp_path / "one.jsonl")) == [
        Example("a\u2028", ["b", "c", "d", "e"], 1)]


@pytest.mark.parametrize("field, reason", [
    ('"label": 4', "label 4"), ('"label": 1e999', "infinity"), ('"label": null', "NoneType"),
    ('"endings": ["b"]', "1 endings"), ('"ctx": ""', "empty text"), ('"ctx": 5', "empty text"),
    ('"ctx"', "delimiter")])
def test_load_examples_names_the_invalid_example(tmp_path, field, reason):
    good = '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 0'
    (tmp_path / "bad.jsonl").write_text(f"{good}}}\n{good}, {field}}}\n")
    with pytest.raises(UserError, match=rf"^example 2 of .*bad\.jsonl is invalid .*{reason}.*: "
                                        "expected a context"):
        load_examples(str(tmp_path / "bad.jsonl"))


def test_pack_example_rejects_tokens_beyond_the_vocabulary():
    with pytest.raises(UserError, match="token id 100, but the model's vocabulary has 100 tokens"):
        pack_example(0, Example("a", ["d"] * 4, 0), BYTES, GPTConfig(vocab_size=100))
