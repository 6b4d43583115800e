"""gpt/hellaswag.py against the reference implementation, in training and as a command."""

import base64
import json
import math
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
from tests.conftest import TINY, Fork, metrics, run

DATA = Path(__file__).parent / "data" / "hellaswag.jsonl"  # our own examples in the original format
# A byte-level tokenizer is fast, and its sequences are four times as long.
BYTES = Tokenizer("".join(f"{base64.b64encode(bytes([i])).decode()} {i}\n" for i in range(256)))
ONE_RANK = Ranks(0, 1, torch.device("cpu"))


def make_model(block_size=1024):
    """Return a model to which every key and position matters."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size, vocab_size=257, n_layer=2, n_head=4, n_embd=48, dropout=0.1))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


# One example fits into exactly 100 positions, another needs exactly 300.
@pytest.mark.parametrize("block_size, rows", [(1024, {1}), (299, {1, 4}), (100, {1, 4}), (1, {4})])
def test_packed_rows_give_the_losses_of_one_row_per_ending(block_size, rows):
    """Also with truncated contexts and endings, in batches of one row and of many."""
    model, examples = make_model(block_size), load_examples(str(DATA)) + make_examples(12)
    assert {len(pack_example(0, example, BYTES, model.config)) for example in examples} == rows
    expected = reference_hellaswag.score_endings(model, BYTES, examples)
    for batch_tokens in (1, 4000):
        *_, (sums, counts) = score_endings(model, BYTES, examples, batch_tokens)
        scores = torch.stack([sums, sums / counts])
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-4)


def test_accuracy_is_the_share_of_the_references_choices_that_equal_the_labels():
    """With the standard error of a proportion, and without dropout."""
    model, examples = make_model(), make_examples(30)
    labels = torch.tensor([example.label for example in examples])
    choices = reference_hellaswag.score_endings(model, BYTES, examples).argmin(2)
    acc, acc_norm = (choices == labels).double().mean(1).tolist()
    model.train()
    result = evaluate_hellaswag(model, BYTES, examples, ONE_RANK)
    assert result == pytest.approx({
        "examples": 30, "acc": acc, "acc_stderr": math.sqrt(acc * (1 - acc) / 29),
        "acc_norm": acc_norm, "acc_norm_stderr": math.sqrt(acc_norm * (1 - acc_norm) / 29)})
    assert model.training


def test_evaluation_ends_after_the_batch_in_which_it_is_stopped():
    answers = iter([True, True])  # after the first batch, and to tell the other ranks
    result = evaluate_hellaswag(make_model(), BYTES, make_examples(30), ONE_RANK,
                                stopped=answers.__next__)
    assert result is None
    assert not list(answers)


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


def test_command_on_two_ranks_agrees_with_the_evaluations_of_a_run(data_root, tmp_path):
    """A signal interrupts the first of these; the resumed run repeats it."""
    flags = "--max_steps 4 --eval_every 1 --hellaswag_every 2 --sample_every 0"
    args = ["--data_root", data_root, "--log_dir", tmp_path, *TINY, *flags.split(),
            "--hellaswag_data", DATA]
    interrupted = Fork("tests/fault_injection.py", *args, FAULT="evaluation SIGTERM").result()
    assert interrupted.returncode == 143, interrupted.stderr
    assert max(metrics(tmp_path, "val")) == 2
    assert not metrics(tmp_path, "hellaswag")
    resumed = run("-m", "scripts.train", *args)
    assert resumed.returncode == 0, resumed.stderr
    done = run("torchrun", "--standalone", "--nproc_per_node=2", "-m", "scripts.eval_hellaswag",
               "--log_dir", tmp_path, "--data", DATA, "--device", "cpu", "--precision", "float32")
    assert "8 examples | acc " in done.stdout, done.stderr
    first, last = metrics(tmp_path, "hellaswag").values()
    assert first["step"] == 2
    result = json.loads((tmp_path / "hellaswag.json").read_text())
    assert result | {"step": 4, "split": "hellaswag"} == last | {
        "checkpoint": str(tmp_path / "model_00004.pt"), "data": str(DATA), "precision": "float32"}


def test_load_examples_reads_files_and_labels_as_they_come(tmp_path):
    """With a byte order mark, a line separator within a text, and labels as text, as on the hub."""
    line = '{"ctx": "a\u2028", "endings": ["b", "c", "d", "e"], "label": "1"}\n'
    (tmp_path / "two.jsonl").write_text(f"\ufeff{line}\n{line}")
    example = Example("a\u2028", ["b", "c", "d", "e"], 1)
    assert load_examples(str(tmp_path / "two.jsonl")) == [example] * 2
    assert load_examples(str(tmp_path / "two.jsonl"), limit=1) == [example]


@pytest.mark.parametrize("field", ['"label": 4', '"label": 1e999', '"label": null', '"ctx"'])
def test_load_examples_names_the_invalid_example(tmp_path, field):
    good = '{"ctx": "a", "endings": ["b", "c", "d", "e"], "label": 0'
    (tmp_path / "bad.jsonl").write_text(f"{good}}}\n{good}, {field}}}\n")
    with pytest.raises(UserError, match=r"^example 2 of .*bad\.jsonl is invalid"):
        load_examples(str(tmp_path / "bad.jsonl"))
