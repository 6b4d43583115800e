"""gpt/hellaswag.py against the reference implementation, in training and as a command."""

import base64
import json
import math

import pytest
import torch

from benchmarks import reference_hellaswag
from benchmarks.reference_hellaswag import make_examples
from gpt.distributed import Ranks
from gpt.errors import UserError
from gpt.hellaswag import Example, evaluate_hellaswag, load_examples, pack_example, score_endings
from gpt.model import GPT
from gpt.tokenizer import Tokenizer
from tests.conftest import TEXT, TINY, Fork, metrics, random_gpt2, run, train

DATA = TEXT.with_name("hellaswag.jsonl")  # our own examples in the original format
# A byte-level tokenizer is fast, and its sequences are four times as long.
BYTES = Tokenizer("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))
ONE_RANK = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def folder(tmp_path):
    """Return a model to which every key and position matters."""
    return random_gpt2(tmp_path, vocab_size=257, n_positions=1024, initializer_range=0.5)


# One example fits into exactly 100 positions, another needs exactly 300.
@pytest.mark.parametrize("block_size, rows", [(1024, {1}), (299, {1, 4}), (100, {1, 4})])
def test_packed_rows_give_the_losses_of_one_row_per_ending(folder, block_size, rows):
    """Also with truncated contexts and endings, in batches of one row and of many."""
    model = GPT.from_pretrained(folder, block_size=block_size)
    examples = load_examples(str(DATA)) + make_examples(12)
    assert {len(pack_example(0, example, BYTES, model.config)) for example in examples} == rows
    expected = reference_hellaswag.score_endings(model, BYTES, examples)
    for batch_tokens in (1, 4000):
        *_, (sums, counts) = score_endings(model, BYTES, examples, batch_tokens)
        scores = torch.stack([sums, sums / counts])
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-4)


def test_accuracy_is_the_share_of_the_references_choices_that_equal_the_labels(folder):
    """With the standard error of a proportion, and without dropout."""
    model, examples = GPT.from_pretrained(folder, dropout=0.1), make_examples(30)
    labels = torch.tensor([example.label for example in examples])
    choices = reference_hellaswag.score_endings(model, BYTES, examples).argmin(2)
    expected = {"examples": 30}
    for name, correct in zip(("acc", "acc_norm"), choices == labels, strict=True):
        p = correct.double().mean().item()
        expected |= {name: p, f"{name}_stderr": math.sqrt(p * (1 - p) / 29)}
    result = evaluate_hellaswag(model.train(), BYTES, examples, ONE_RANK)
    assert result == pytest.approx(expected)
    assert model.training


def test_evaluation_ends_after_the_batch_in_which_it_is_stopped(folder):
    model = GPT.from_pretrained(folder)
    answers = iter([True, True])  # after the first batch, and to tell the other ranks
    assert evaluate_hellaswag(model, BYTES, make_examples(30), ONE_RANK,
                              stopped=answers.__next__) is None
    assert not list(answers)


def test_command_on_two_ranks_agrees_with_the_evaluations_of_a_run(data_root, tmp_path):
    """A signal interrupts the first of these; the resumed run repeats it."""
    flags = ["--max_steps", 4, "--eval_every", 1, "--hellaswag_every", 2, "--sample_every", 0,
             "--hellaswag_data", DATA]
    interrupted = Fork("tests/fault_injection.py", "--data_root", data_root, "--log_dir", tmp_path,
                       *TINY, *flags, FAULT="evaluation SIGTERM").result()
    assert interrupted.returncode == 143, interrupted.stderr
    assert not metrics(tmp_path, "hellaswag")
    train(data_root, tmp_path, *flags)
    done = run("torchrun", "--standalone", "--nproc_per_node=2", "-m", "scripts.eval_hellaswag",
               "--log_dir", tmp_path, "--data", DATA, "--device", "cpu", "--precision", "float32")
    assert "8 examples | acc " in done.stdout, done.stderr
    evaluations = metrics(tmp_path, "hellaswag")
    assert list(evaluations) == [2, 4]
    result = json.loads((tmp_path / "hellaswag.json").read_text())
    for name in ("acc", "acc_norm", "acc_norm_stderr"):
        assert result[name] == evaluations[4][name]


def test_load_examples_reads_files_and_labels_as_they_come(tmp_path):
    """With a byte order mark, a line separator within a text, and labels as text, as on the hub."""
    line = '{"ctx": "a\u2028", "endings": ["b", "c", "d", "e"], "label": "1"}\n'
    (tmp_path / "two.jsonl").write_text(f"\ufeff{line}\n{line}")
    example = Example("a\u2028", ["b", "c", "d", "e"], 1)
    assert load_examples(str(tmp_path / "two.jsonl")) == [example] * 2
    assert load_examples(str(tmp_path / "two.jsonl"), limit=1) == [example]


@pytest.mark.parametrize("label", ["4", "null", ""])
def test_load_examples_names_the_invalid_example(tmp_path, label):
    line = '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": '
    (tmp_path / "bad.jsonl").write_text(f"{line} 0}}\n{line} {label}}}\n")
    with pytest.raises(UserError, match=r"^example 2 of .*bad\.jsonl is invalid"):
        load_examples(str(tmp_path / "bad.jsonl"))
