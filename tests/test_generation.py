"""gpt/generation.py: the KV cache, packed weights and sampling
against reference implementations."""

import copy

import pytest
import torch

from gpt.config import GPTConfig
from gpt.generation import (
    CAN_PACK,
    KVCache,
    decode,
    generate,
    generate_text,
    prefill,
    prepare_for_inference,
    sample,
    stream_text,
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


def columns(steps):
    return [list(row) for row in zip(*steps, strict=True)]


@pytest.mark.parametrize("prompts", [[[1, 2], [3, 4]], [[1, 2, 3], [7], [*range(20)], [5] * 12]])
def test_generate_equals_full_forward_passes_beyond_the_context(model, prompts):
    """Prompts of equal and of different lengths in one batch,
    30 new tokens with a context of 12."""
    rows, generator = [list(prompt) for prompt in prompts], torch.Generator().manual_seed(3)
    for _ in range(30):
        logits = torch.stack([model(torch.tensor([row[-12:]]))[0, -1] for row in rows])
        for row, token in zip(rows, sample(logits, 1.0, 0, 1.0, generator), strict=True):
            row.append(token.item())
    assert columns(generate(model, prompts, 30, seed=3)) == [row[-30:] for row in rows]


def assert_same_logits(reference, model, tolerance, n_keys=0):
    """Compare a batch of prompts of different lengths and, through the KV cache, each of the next 7
    tokens. n_keys: decode with this many keys, most of them masked, as on a GPU."""
    rows = [[*range(1, 6)], [7], [9, 8, 7]]
    cache = KVCache(model.config, len(rows), n_keys or 12, torch.device("cpu"))
    with torch.no_grad():
        logits = prefill(model, cache, rows)
        for token in range(8):
            for row, row_logits in zip(rows, logits, strict=True):
                expected = reference(torch.tensor([row]))[0, -1]
                assert (row_logits - expected).norm() < tolerance * expected.norm()
                row.append(token)
            if len(rows[0]) <= 12:
                idx = torch.full((3, 1), token)
                logits = decode(model, cache, idx, n_keys or len(rows[0]), needs_mask=True)
                cache.positions += 1


@pytest.mark.parametrize("n_keys", [0, 128])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_kv_cache_logits_equal_full_forward_pass(model, dtype, tolerance, n_keys):
    """Comparing greedy tokens only would hide small errors."""
    assert_same_logits(model, copy.deepcopy(model).to(dtype), tolerance, n_keys)


@pytest.mark.skipif(not CAN_PACK, reason="oneDNN packs weights on x86 only")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_packed_weights_give_the_same_logits(model, dtype, tolerance):
    packed = copy.deepcopy(model)
    prepare_for_inference(packed, dtype)
    # No matrix is stored twice, except the tied embedding.
    assert all(name.startswith(("wte", "wpe")) or p.ndim == 1
               for name, p in packed.named_parameters())
    assert "lm_head" in vars(packed)
    assert_same_logits(model, packed, tolerance)


def test_generate_processes_each_token_once(model):
    shapes = []
    with model.h[0].register_forward_hook(
            lambda module, args, out: shapes.append(tuple(out.shape[:2]))):
        list(generate(model, [[1, 2, 3], [4]], 8))
    assert shapes == [(2, 3)] + [(2, 1)] * 7


@pytest.mark.parametrize("temperature, top_k, top_p, n_kept", [
    (1.0, 0, 1.0, 5), (0.5, 0, 1.0, 5), (2.0, 3, 1.0, 3), (1.0, 99, 1.0, 5), (1.0, 0, 0.8, 3),
    (1.0, 0, 0.01, 1)])
def test_sample_frequencies_match_the_formula(temperature, top_k, top_p, n_kept):
    """softmax(logits / temperature) over the n most likely tokens;
    they have .55, .20, .12, .07 and .05 (for top_p)."""
    logits = torch.tensor([2.0, 0.5, 1.0, -0.5, 0.0])
    least = logits.sort(descending=True)[0][n_kept - 1]
    expected = torch.where(logits >= least, logits / temperature, -torch.inf)
    expected = expected.softmax(0)
    generator = torch.Generator().manual_seed(0)
    sampled = sample(logits.expand(20_000, 5), temperature, top_k, top_p, generator)
    frequencies = torch.bincount(sampled, minlength=5) / len(sampled)
    assert (frequencies - expected).abs().max() < 0.015
    assert torch.all(frequencies[expected == 0] == 0)


def test_generate_depends_on_the_seed_alone(model):
    """Samples of one prompt differ; the global random state is neither used nor changed."""
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = columns(generate(model, [[1]] * 3, 20, seed=7))
    assert len({tuple(tokens) for tokens in first}) == 3
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert columns(generate(model, [[1]] * 3, 20, seed=7)) == first
    assert columns(generate(model, [[1]] * 3, 20, seed=8)) != first


def test_stop_token_ends_only_its_own_sample(model):
    """It is repeated there; other samples are unchanged,
    and the iterator ends when all have reached it."""
    free = columns(generate(model, [[1], [2], [3]], 25, seed=1))
    stop = free[0][3]
    stopped = columns(generate(model, [[1], [2], [3]], 25, seed=1, stop_token=stop))
    for row, expected in zip(stopped, free, strict=True):
        end = expected.index(stop) + 1 if stop in expected else 25
        assert row == expected[:end] + [stop] * (25 - end)
    alone = [token for token, in generate(model, [[1]], 25, seed=1)]
    assert len(list(generate(model, [[1]], 25, seed=1, stop_token=alone[0]))) == 1


def test_generate_restores_training_mode_when_abandoned(model):
    """Otherwise sampling during training would switch off dropout for the rest of the run."""
    model.train()
    steps = generate(model, [[1]], 2)
    next(steps)
    assert not model.training
    steps.close()
    assert model.training
    model.eval()


def scripted_model(ids):
    """Return a model with a padded vocabulary
    whose most likely token at position i is ids[i] in any context."""
    model = GPT(GPTConfig(block_size=32, vocab_size=50304, n_layer=1, n_head=1, n_embd=32))
    model.requires_grad_(False)
    for weight in (model.h[0].attn.c_proj.weight, model.h[0].mlp.c_proj.weight,
                   model.wte.weight, model.wpe.weight):
        weight.zero_()
    for position, token in enumerate(ids):
        model.wpe.weight[position, position] = 2.0
        model.wte.weight[token, position] = 1.0
    return model


def test_stream_text_yields_whole_characters_and_hides_end_of_text():
    tokenizer, text = Tokenizer(), "naïve 東京 🙂"
    # 50300: beyond the tokenizer's vocabulary
    ids = [*tokenizer.encode(text), 50300, tokenizer.end_of_text]
    model = scripted_model(ids)
    pieces = [piece for piece, in stream_text(model, tokenizer, ["A"], 31, temperature=0)]
    assert "".join(pieces) == "A" + text and "\ufffd" not in "".join(pieces)
    assert len(pieces) == 1 + len(ids) + 1  # the prompt, one per token, the remainder
    half = next(i for i in range(len(ids)) if tokenizer.decode(ids[:i]).endswith("\ufffd"))
    expected = "A" + tokenizer.decode(ids[:half])
    assert generate_text(model, tokenizer, ["A"], half, temperature=0) == [expected]
