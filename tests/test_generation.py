"""gpt/generation.py: the KV cache, packed weights and sampling
against reference implementations."""

import copy
from types import SimpleNamespace

import pytest
import torch

from gpt import generation
from gpt.config import GPTConfig
from gpt.generation import (
    CAN_PACK,
    generate,
    generate_text,
    prepare_for_inference,
    sample,
)
from gpt.model import GPT
from gpt.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model():
    """Return a model with distinct logits and nonzero biases."""
    torch.manual_seed(0)
    net = GPT(GPTConfig(block_size=12, vocab_size=40, n_layer=2, n_head=2, n_embd=16))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return net.eval().requires_grad_(False)


def samples(*args, **settings):
    """Return the new tokens of each prompt."""
    return torch.tensor([*generate(*args, **settings)]).T.tolist()


@pytest.mark.parametrize("prompts", [[[1, 2], [3, 4]], [[1, 2, 3], [7]], [[*range(20)], [7]]])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@pytest.mark.parametrize("packed", [False, True])
def test_logits_equal_those_of_full_forward_passes_beyond_the_context(
        model, monkeypatch, prompts, dtype, tolerance, packed):
    """Prompts of equal and of different lengths in one batch, 30 random tokens with a context of
    12. Comparing tokens only would hide small errors."""
    monkeypatch.setattr(generation, "CAN_PACK", CAN_PACK and packed)
    prepared = copy.deepcopy(model)
    prepare_for_inference(prepared, dtype)
    rows = copy.deepcopy(prompts)
    torch.manual_seed(0)

    def compare(logits, *_):
        for row, row_logits in zip(rows, logits, strict=True):
            expected = model(torch.tensor([row[-12:]]))[0, -1]
            assert (row_logits - expected).norm() < tolerance * expected.norm(), len(row)
            row.append(torch.randint(40, ()).item())
        return torch.tensor([row[-1] for row in rows])

    monkeypatch.setattr(generation, "sample", compare)
    assert samples(prepared, prompts, 30) == [row[-30:] for row in rows]


def test_generate_processes_each_token_once(model):
    lengths = []
    with model.h[0].register_forward_hook(lambda module, args, out: lengths.append(out.shape[1])):
        samples(model, [[1, 2, 3], [4]], 8)
    assert lengths == [3] + [1] * 7


@pytest.mark.parametrize("temperature, top_k, top_p, n_kept", [
    (0.5, 99, 1.0, 5), (2.0, 3, 1.0, 3), (1.0, 0, 0.8, 3)])
def test_sample_frequencies_match_the_formula(temperature, top_k, top_p, n_kept):
    """softmax(logits / temperature) over the n most likely tokens;
    they have .55, .20, .12, .07 and .05 (for top_p)."""
    logits = torch.tensor([0.5, 2.0, 1.0, 0.0, -0.5])
    kept = logits.argsort(descending=True)[:n_kept]
    expected = torch.zeros(5)
    expected[kept] = (logits[kept] / temperature).softmax(0)
    sampled = sample(logits.expand(20_000, 5), temperature, top_k, top_p, torch.Generator())
    frequencies = torch.bincount(sampled, minlength=5) / len(sampled)
    assert (frequencies - expected).abs().max() < 0.015
    assert set(sampled.tolist()) == set(kept.tolist())


def test_generate_depends_on_the_seed_alone(model):
    """Samples of one prompt differ; the global random state is neither used nor changed."""
    state = torch.get_rng_state()
    first, again, other = (samples(model, [[1]] * 2, 20, seed=seed) for seed in (7, 7, 8))
    assert first == again != other
    assert first[0] != first[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_stop_token_ends_only_its_own_sample(model):
    """It is repeated there as long as others need; when all have reached it, the iterator ends."""
    first, second = samples(model, [[1], [2]], 25, seed=1)
    stop = next(token for token in first if token not in second)
    end = first.index(stop)
    expected = [first[:end] + [stop] * (25 - end), second]
    assert samples(model, [[1], [2]], 25, seed=1, stop_token=stop) == expected
    [[token, *_]] = samples(model, [[1]], 25)
    assert samples(model, [[1]], 25, stop_token=token) == [[token]]


def test_generate_restores_training_mode_when_abandoned(model):
    """Otherwise sampling during training would switch off dropout for the rest of the run."""
    model.train()
    steps = generate(model, [[1]], 2)
    next(steps)
    assert not model.training
    steps.close()
    assert model.training
    model.eval()


def test_text_has_whole_characters_and_no_end_of_text(monkeypatch):
    """Ids beyond the tokenizer's are the padding of some models' vocabularies."""
    tokenizer = Tokenizer()
    text = tokenizer.encode(" naïve 🦊")
    ids = [50300, *text, tokenizer.end_of_text]
    model = SimpleNamespace(config=GPTConfig())

    def scripted(model, prompts, max_new_tokens, stop_token):
        assert stop_token == tokenizer.end_of_text
        yield from ([token] for token in ids[:max_new_tokens])

    monkeypatch.setattr(generation, "generate", scripted)
    assert generate_text(model, tokenizer, ["So"], 99) == ["So naïve 🦊"]
    assert generate_text(model, tokenizer, ["So"], len(text)) == ["So naïve \ufffd"]
