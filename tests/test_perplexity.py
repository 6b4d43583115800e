"""scripts/eval_perplexity.py and its sliding windows, against Hugging Face's guide with transformers' model."""

import math
import re

import numpy as np
import pytest
import torch
from transformers import GPT2LMHeadModel

from gpt.evaluation import sliding_window_losses
from gpt.model import GPT
from gpt.tokenizer import Tokenizer
from tests.conftest import TEXT, random_gpt2, run


def guide(model, tokens, max_length, stride):
    """The guide's procedure, each token's loss: labels are -100 for what the window before has predicted."""
    losses, end_before = [], 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + max_length, len(tokens))
        labels = torch.tensor(tokens[begin:end])
        labels[:-(end - end_before)] = -100
        with torch.no_grad():
            logits = model(torch.tensor([tokens[begin:end]])).logits[0]
        each = torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="none")
        losses += each[labels[1:] != -100].tolist()
        end_before = end
        if end == len(tokens):
            break
    return losses


@pytest.mark.parametrize("stride", [1, 3, 10, 19, 20])
def test_every_token_has_the_loss_of_the_guide(tmp_path, stride):
    """The same tokens in the same context, for every kind of remainder, in batches of any size."""
    folder = random_gpt2(tmp_path, vocab_size=90, n_positions=20, initializer_range=0.4)
    theirs, ours = GPT2LMHeadModel.from_pretrained(folder).eval(), GPT.from_pretrained(folder)
    for n in (2, 19, 20, 21, 39, 40, 41, 77):
        tokens = np.random.default_rng(n).integers(90, size=n)
        expected = guide(theirs, tokens.tolist(), 20, stride)
        for batch_size in (1, 3, 100):
            pairs = list(sliding_window_losses(ours, tokens, stride, batch_size))
            losses, targets = (np.concatenate(column) for column in zip(*pairs, strict=True))
            assert losses == pytest.approx(expected, abs=1e-4), (n, batch_size)
            if stride < 20:
                assert targets.tolist() == tokens[1:].tolist()  # each once, all but the first


def test_the_command_reports_the_guides_perplexity(gpt2_folder, tmp_path, data_root):
    """Of a text and of shards; bits per byte count the text's bytes, without its first token."""
    text = TEXT.read_text()[:1500]
    (tmp_path / "text.txt").write_text(text)
    tokens = Tokenizer().encode(text)
    losses = guide(GPT2LMHeadModel.from_pretrained(gpt2_folder).eval(), tokens, 48, 24)
    n_bytes = len(text.encode()) - len(Tokenizer().decode(tokens[:1]))

    def report(*words):
        done = run("-m", "scripts.eval_perplexity", "--checkpoint", gpt2_folder, "--device", "cpu", *words)
        assert done.returncode == 0, done.stderr
        return [float(number.replace(",", "")) for number in re.findall(r"[\d,]*\.?\d+", done.stdout)], done.stdout

    numbers, line = report("--data", tmp_path / "text.txt")
    assert numbers == pytest.approx([
        len(losses), n_bytes, np.mean(losses), math.exp(np.mean(losses)), sum(losses) / math.log(2) / n_bytes, 24],
        rel=1e-4), line
    val = np.load(data_root / "val_00000.npy")
    numbers, line = report("--data", data_root, "--stride", "48")
    expected = guide(GPT2LMHeadModel.from_pretrained(gpt2_folder).eval(), val.tolist(), 48, 48)
    assert numbers[0] == len(expected) and numbers[2] == pytest.approx(np.mean(expected), rel=1e-4), line
