"""scripts/eval_perplexity.py and its sliding windows, against one forward pass for each token."""

import math
import re

import numpy as np
import pytest
import torch

from gpt.checkpoint import save_model
from gpt.config import GPTConfig
from gpt.evaluation import sliding_window_losses
from gpt.model import GPT
from gpt.tokenizer import Tokenizer
from tests.conftest import TEXT, run


def random_model(block_size, vocab_size):
    """Return a model with distinct logits."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size, vocab_size, n_layer=2, n_head=2, n_embd=16))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval().requires_grad_(False)


def reference_losses(model, tokens, stride):
    """Return the loss of each token in the first window that contains it, if another token precedes
    it there."""
    losses = []
    for i in range(1, len(tokens)):
        begin = stride * max(0, math.ceil((i + 1 - model.config.block_size) / stride))
        if begin < i:
            log_p = model(torch.tensor([tokens[begin:i]]))[0, -1].log_softmax(-1)
            losses.append(-log_p[tokens[i]].item())
    return losses


@pytest.mark.parametrize("stride", [1, 3, 19, 20])
def test_sliding_window_losses_equal_the_reference(stride):
    """For every kind of remainder, in batches of any size."""
    model = random_model(block_size=20, vocab_size=90)
    for n in (2, 19, 20, 21, 40, 77):
        tokens = np.random.default_rng(n).integers(90, size=n)
        expected = reference_losses(model, tokens.tolist(), stride)
        for batch_size in (1, 3, 100):
            batches = sliding_window_losses(model, tokens, stride, batch_size)
            losses, targets = (np.concatenate(column) for column in zip(*batches, strict=True))
            assert losses == pytest.approx(expected, abs=1e-4), (n, batch_size)
            if stride < 20:  # otherwise the first token of a window has no prediction
                assert targets.tolist() == tokens[1:].tolist()


def test_eval_perplexity_equals_the_reference(tmp_path):
    """By default the stride is half the context. The text follows <|endoftext|>, as in shards, so
    its first token is predicted, too."""
    model, tokenizer = random_model(block_size=48, vocab_size=50257), Tokenizer()
    text = TEXT.read_text()[:1500]
    save_model(tmp_path / "model.pt", model, step=0, tokenizer="gpt2")
    (tmp_path / "text.txt").write_text(text)
    losses = reference_losses(model, [tokenizer.end_of_text, *tokenizer.encode(text)], 24)
    done = run("-m", "scripts.eval_perplexity", "--checkpoint", tmp_path / "model.pt",
               "--device", "cpu", "--data", tmp_path / "text.txt")
    numbers = [float(number.replace(",", ""))
               for number in re.findall(r"[\d,]*\.?\d+", done.stdout)]
    loss, n_bytes = np.mean(losses), len(text.encode())
    bits_per_byte = sum(losses) / math.log(2) / n_bytes
    expected = [len(losses), n_bytes, loss, math.exp(loss), bits_per_byte, 24]
    assert numbers == pytest.approx(expected, rel=1e-4), done.stdout + done.stderr
