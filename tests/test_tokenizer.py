"""gpt/tokenizer.py: GPT-2's encoding without a network, and tokenizers learned from text."""

import inspect

import pytest
import tiktoken_ext.openai_public
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken._educational import SimpleBytePairEncoding
from tokenizers import models, pre_tokenizers, trainers

from gpt.errors import UserError
from gpt.tokenizer import MERGES_SHA256, PATTERN, Tokenizer
from tests.conftest import TEXT

GPT2 = Tokenizer()
LEARNED = Tokenizer.train([TEXT.read_text()[:20000]], 500)
UNUSUAL = " naïve café 東京 🙂  \t\n\n  12345 don't I'll  'twas"


def test_gpt2_tokenizer_equals_tiktokens():
    """With another merge table or pattern the ids would not fit released GPT-2 models."""
    assert MERGES_SHA256 in inspect.getsource(tiktoken_ext.openai_public.r50k_base)
    assert tiktoken_ext.openai_public.r50k_pat_str == PATTERN
    assert (GPT2.name, GPT2.n_vocab, GPT2.end_of_text) == ("gpt2", 50257, 50256)
    ids = GPT2.encode("Hello, I'm a language model,")
    assert ids == [15496, 11, 314, 1101, 257, 3303, 2746, 11]


def test_gpt2_tokenizer_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket", None)  # a connection would be a TypeError
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    assert Tokenizer().encode("Hello world") == [15496, 995]


def test_end_of_text_in_text_is_ordinary_unless_allowed():
    assert GPT2.encode("<|endoftext|>", allow_special=True) == [50256]
    assert GPT2.decode(GPT2.encode("<|endoftext|>")) == "<|endoftext|>"
    assert 50256 not in GPT2.encode("<|endoftext|>")


@pytest.mark.parametrize("tokenizer", [GPT2, LEARNED], ids=lambda tokenizer: tokenizer.name)
def test_encode_equals_the_educational_implementation(tokenizer):
    reference = SimpleBytePairEncoding(pat_str=PATTERN, mergeable_ranks=tokenizer.mergeable_ranks)
    text = TEXT.read_text()[:3000] + UNUSUAL
    assert tokenizer.encode(text) == reference.encode(text, visualise=None)


def test_train_equals_the_tokenizers_library():
    """`tokenizers` merges by a list of pairs, tiktoken by the ranks of tokens:
    the ids must be equal."""
    reference = tokenizers.Tokenizer(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.train_from_iterator([TEXT.read_text()[:20000]], trainers.BpeTrainer(
        vocab_size=499, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    text = TEXT.read_text() + UNUSUAL
    assert LEARNED.encode(text) == reference.encode(text).ids
    assert LEARNED.name.startswith("bpe500-") and LEARNED.n_vocab == 500
    assert Tokenizer.train(["aaa"], 1000).n_vocab < 270  # no more pairs


@given(st.text() | st.binary().map(lambda data: data.decode("utf-8", "replace")))
@settings(max_examples=200, deadline=None)
def test_decode_returns_any_encoded_text(text):
    """Every byte has a token, so every text can be encoded."""
    ids = LEARNED.encode(text)
    assert LEARNED.decode(ids) == text
    assert LEARNED.token_lengths()[ids].sum() == len(text.encode())


def test_damaged_merge_table_is_rejected():
    """A checkpoint from elsewhere may hold anything."""
    lines = LEARNED.merge_table.splitlines(keepends=True)
    for damaged in (lines[1:], lines[:-5] + lines[-4:], [*lines, lines[7]],
                    [*lines[:-1], "!! 498\n"], [*lines[:-1], "aGVsbG8= x\n"]):
        with pytest.raises(UserError, match="damaged"):
            Tokenizer("".join(damaged))
