"""scripts/eval_perplexity.py and its sliding windows, against one forward pass for each token."""

import math
import re

import numpy as np
import pytest
import torch

from gpt.evaluation import sliding_window_losses
from gpt.model import GPT
from gpt.tokenizer import Tokenizer
from tests.conftest import TEXT, run


@pytest.fixture(scope="module")
def model(gpt2_folder):
    """Return a model with a context of 48 tokens."""
    return GPT.from_pretrained(gpt2_folder).requires_grad_(False)


def reference_losses(model, tokens, stride):
    """Return the loss of each token in the first window that contains it, if another token precedes
    it there."""
    losses = []
    for i in range(1, len(tokens)):
        begin = stride * max(0, math.ceil((i + 1 - 48) / stride))
        if begin < i:
            log_p = model(torch.tensor([tokens[begin:i]]))[0, -1].log_softmax(-1)
            losses.append(-log_p[tokens[i]].item())
    return losses


@pytest.mark.parametrize("stride", [1, 7, 47, 48])
def test_sliding_window_losses_equal_the_reference(model, stride):
    """For every kind of remainder, in batches of any size."""
    for n in (2, 48, 49, 110):
        tokens = np.random.default_rng(n).integers(50257, size=n)
        expected = reference_losses(model, tokens.tolist(), stride)
        for batch_size in (1, 3):
            batches = sliding_window_losses(model, tokens, stride, batch_size)
            losses = np.concatenate([losses for losses, _ in batches])
            assert losses == pytest.approx(expected, abs=1e-4)


def test_eval_perplexity_equals_the_reference(model, gpt2_folder, tmp_path):
    """By default the stride is half the context. The text follows <|endoftext|>, as in shards, so
    its first token is predicted, too."""
    text = TEXT.read_text()[:1500]
    (tmp_path / "text.txt").write_text(text)
    losses = reference_losses(model, [50256, *Tokenizer().encode(text)], 24)
    done = run("-m", "scripts.eval_perplexity", "--checkpoint", gpt2_folder, "--device", "cpu",
               "--data", tmp_path / "text.txt")
    numbers = [float(number) for number in re.findall(r"\d*\.?\d+", done.stdout.replace(",", ""))]
    loss, bits = np.mean(losses), sum(losses) / math.log(2)
    assert numbers == pytest.approx(
        [len(losses), 1500, loss, math.exp(loss), bits / 1500, 24], rel=1e-4), done.stderr
