"""gpt/generation.py: sampling, the KV cache and packed weights against plain formulas."""

import copy

import pytest
import torch

from gpt.config import GPTConfig
from gpt.generation import (
    CAN_PACK,
    KVCache,
    generate,
    generate_text,
    next_token_logits,
    prepare_for_generation,
    sample,
    stream_text,
)
from gpt.model import GPT
from gpt.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = GPT(GPTConfig(block_size=12, vocab_size=40, n_layer=2, n_head=2, n_embd=16))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return net.eval()


def greedy(model, prompt, n):
    """The plain loop: the whole (cropped) context through the model, the likeliest token appended."""
    row = list(prompt)
    for _ in range(n):
        row.append(model(torch.tensor([row[-12:]]))[0, -1].argmax().item())
    return row[len(prompt):]


def columns(steps):
    return [list(row) for row in zip(*steps, strict=True)]


@pytest.mark.parametrize("prompts", [[[1, 2, 3], [7], [9] * 11], [[1, 2], [3, 4]],
                                     [[1, 2, 3], [7], [*range(20)], [5] * 12]])
@pytest.mark.parametrize("use_cache", [True, False])
def test_greedy_equals_the_plain_loop_beyond_the_context(model, prompts, use_cache):
    """Prompts of the same and of different lengths in one batch, 30 tokens on a context of 12, with the KV cache and
    without."""
    batch = columns(generate(model, prompts, 30, temperature=0, use_cache=use_cache))
    assert batch == [greedy(model, prompt, 30) for prompt in prompts]
    assert columns(generate(model, prompts, 30, top_k=1, use_cache=use_cache)) == batch


def test_the_cache_has_the_logits_of_the_whole_text(model):
    """Step by step to 1e-5, at every position: greedy tokens alone would hide a small error."""
    rows = [[*range(1, 6)], [7], [9, 8, 7]]
    cache = KVCache(model, len(rows), 12)
    with torch.no_grad():
        for step in range(7):
            found = next_token_logits(model, rows, cache)
            for row, logits in zip(rows, found, strict=True):
                assert torch.allclose(logits, model(torch.tensor([row]))[0, -1], atol=1e-5)
                row.append(step)


def test_each_earlier_token_is_read_once(model):
    """That is what the cache is for."""
    def shapes(prompts: list[list[int]]) -> list[tuple[int, ...]]:
        seen = []
        handle = model.h[0].register_forward_hook(lambda module, arguments, out: seen.append(out.shape[:2]))
        list(generate(model, prompts, 8))
        handle.remove()
        return seen

    assert shapes([[1, 2, 3], [4]]) == [(2, 3)] + [(2, 1)] * 7
    assert shapes([[1, 2, 3]] * 2) == [(1, 3)] + [(2, 1)] * 7  # one prompt for both


def test_samples_of_one_prompt(model):
    """They differ from the first draw on, and are those of the plain loop, beyond the context too."""
    samples = columns(generate(model, [[1, 2, 3]] * 4, 30, seed=3))
    assert len({tuple(sample) for sample in samples}) == 4
    assert columns(generate(model, [[1, 2, 3]] * 4, 30, seed=3, use_cache=False)) == samples


def test_bfloat16_weights(model):
    """Half the memory, three digits, through the cache too: the logits are near those of float32."""
    half, rows = copy.deepcopy(model).to(torch.bfloat16), [[3, 1], [4]]
    cache = KVCache(half, 2, 12)
    with torch.no_grad():
        for step in range(9):
            for row, logits in zip(rows, next_token_logits(half, rows, cache), strict=True):
                expected = model(torch.tensor([row]))[0, -1]
                assert (logits - expected).norm() < 0.05 * expected.norm()
                row.append(step)
    assert cache.kv[0].dtype == torch.bfloat16


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def plain_and_packed(request):
    """A model of 4 layers whose logits differ clearly, converted but not packed, and its packed copy."""
    torch.manual_seed(0)
    plain = GPT(GPTConfig(block_size=64, vocab_size=500, n_layer=4, n_head=4, n_embd=128)).eval().requires_grad_(False)
    for parameter in plain.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)  # biases too
    packed = copy.deepcopy(plain)
    prepare_for_generation(packed, request.param)
    return plain.to(request.param), packed, 1e-5 if request.param == torch.float32 else 0.02


@pytest.mark.skipif(not CAN_PACK, reason="oneDNN packs weights on x86 only")
def test_packed_weights_give_the_same_logits(plain_and_packed):
    """Relative error below 1e-5 in float32 and 0.02 in bfloat16, for a prompt, for one token, and through the cache."""
    plain, packed, tolerance = plain_and_packed
    assert all(name.startswith(("wte", "wpe")) or p.ndim == 1 for name, p in packed.named_parameters())  # none twice
    assert "lm_head" in vars(packed)
    rows = [[*range(40)], [7], [9, 8, 7]]
    cache = KVCache(packed, len(rows), 64)
    with torch.no_grad():
        for step in range(10):
            expected = next_token_logits(plain, rows)
            for logits in (next_token_logits(packed, rows), next_token_logits(packed, rows, cache)):
                assert (logits - expected).norm() < tolerance * expected.norm()
            for row in rows:
                row.append(step)


@pytest.mark.skipif(not CAN_PACK, reason="oneDNN packs weights on x86 only")
def test_packed_float32_weights_give_the_same_text(plain_and_packed):
    """Greedy and sampled tokens of several texts, beyond the context."""
    plain, packed, tolerance = plain_and_packed
    if tolerance < 1e-4:
        for settings in ({"temperature": 0}, {"top_k": 50}):
            texts = [columns(generate(model, [[1, 2, 3], [4]], 80, **settings)) for model in (plain, packed)]
            assert texts[0] == texts[1]


def test_draws_have_the_right_frequencies():
    """Temperature, top-k and top-p against the probabilities worked out by hand."""
    logits = torch.tensor([2.0, 0.5, 1.0, -1.0, 0.0])
    order = logits.argsort(descending=True).tolist()  # 0 2 1 4 3

    def expected(temperature, keep):
        weights = torch.full((5,), -torch.inf)
        weights[order[:keep]] = logits[order[:keep]] / temperature
        return weights.softmax(0)

    # probabilities at temperature 1: .55 .20 .12 .074 .027 -> top_p 0.8 keeps three
    for settings, want in [((1.0, 0, 1.0), expected(1.0, 5)), ((0.5, 0, 1.0), expected(0.5, 5)),
                           ((2.0, 3, 1.0), expected(2.0, 3)), ((1.0, 0, 0.8), expected(1.0, 3)),
                           ((1.0, 0, 0.01), expected(1.0, 1)), ((1.0, 99, 1.0), expected(1.0, 5))]:
        generator = torch.Generator().manual_seed(0)
        drawn = torch.tensor(sample(logits.expand(20_000, 5).clone(), *settings, generator))
        frequencies = torch.bincount(drawn, minlength=5) / len(drawn)
        assert (frequencies - want).abs().max() < 0.015, settings
        assert torch.all(frequencies[want == 0] == 0), settings


def test_the_seed_decides_and_nothing_else(model):
    """The same seed writes the same text, and training's random numbers are not touched."""
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = columns(generate(model, [[1], [2]], 20, seed=7))
    assert columns(generate(model, [[1], [2]], 20, seed=7, use_cache=False)) == first
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert columns(generate(model, [[1], [2]], 20, seed=7)) == first
    assert columns(generate(model, [[1], [2]], 20, seed=8)) != first


def test_a_finished_row_stays_finished(model):
    """The row that draws the stop token yields None from there on; the others go on."""
    plain = columns(generate(model, [[1], [2], [3]], 25, seed=1))
    stop = plain[0][3]
    rows = columns(generate(model, [[1], [2], [3]], 25, seed=1, stop_token=stop))
    for row, free in zip(rows, plain, strict=True):
        end = free.index(stop) + 1 if stop in free else 25
        assert row[:end] == free[:end]
        assert all(token is None for token in row[end:])
    alone = list(generate(model, [[1]], 25, temperature=0, stop_token=greedy(model, [1], 1)[0]))
    assert len(alone) == 1  # nothing left to draw


def test_training_mode_is_given_back(model):
    """Sampling in the middle of training must not switch dropout off for the rest of it."""
    model.train()
    list(generate(model, [[1]], 2))
    assert model.training
    next(iter(generate(model, [[1]], 2)))  # abandoned in the middle
    assert model.training
    model.eval()


def test_generate_text_hides_the_end_of_text():
    """Text, not tokens: the prompt and what follows, up to <|endoftext|>."""
    tokenizer = Tokenizer()
    model = GPT(GPTConfig(block_size=8, vocab_size=50257, n_layer=1, n_head=1, n_embd=4)).eval()
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.copy_(torch.tensor([1.0, 0, 0, 0]))  # every position says the same
        model.wte.weight.zero_()
        model.wte.weight[tokenizer.encode(" dog")[0], 0] = 1
    assert generate_text(model, tokenizer, ["A"], 3, temperature=0) == ["A dog dog dog"]
    with torch.no_grad():
        model.wte.weight[tokenizer.end_of_text, 0] = 2
    assert generate_text(model, tokenizer, ["A", "Two words"], 3, temperature=0) == ["A", "Two words"]


def test_characters_of_several_tokens_come_whole():
    """What streams to a terminal, joined, is what the tokens say; no half of a character is shown."""
    tokenizer = Tokenizer()
    text = "naïve 東京 🙂"
    ids = tokenizer.encode(text)
    model = GPT(GPTConfig(block_size=32, vocab_size=50257, n_layer=1, n_head=1, n_embd=32)).eval()
    with torch.no_grad():  # at each position the likeliest token is the text's next one
        model.h[0].attn.c_proj.weight.zero_(), model.h[0].mlp.c_proj.weight.zero_()
        model.wte.weight.zero_(), model.wpe.weight.zero_()
        for position, token in enumerate(ids):
            model.wpe.weight[position, position] = 2.0
            model.wte.weight[token, position] = 1.0
    pieces = [piece for piece, in stream_text(model, tokenizer, ["A"], len(ids), temperature=0)]
    assert "".join(pieces) == "A" + text and "" in pieces and "\ufffd" not in "".join(pieces)
    cut = next(i for i in range(len(ids)) if tokenizer.decode(ids[:i]).endswith("\ufffd"))
    assert generate_text(model, tokenizer, ["A"], cut, temperature=0) == ["A" + tokenizer.decode(ids[:cut])]
