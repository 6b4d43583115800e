"""gpt/tokenizer.py: GPT-2's encoding without a network, and tokenizers learned from text."""

import hashlib
import shutil

import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from gpt.errors import UserError
from gpt.tokenizer import MERGES, Tokenizer
from tests.conftest import TEXT

TEXTS = TEXT.read_text() + " naïve café 東京 🙂  \t\n\n  12345 don't I'll  'twas"
LEARNED = Tokenizer.train([TEXTS[:20000]], 500)
URL = "https://openaipublic.blob.core.windows.net/encodings/r50k_base.tiktoken"


def test_gpt2_tokenizer_equals_tiktokens_without_a_network(tmp_path, monkeypatch):
    """tiktoken finds our merge table in its cache of downloads and compares it with its hash."""
    monkeypatch.setattr("socket.socket", None)  # a connection would be a TypeError
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    shutil.copy(MERGES, tmp_path / hashlib.sha1(URL.encode()).hexdigest())
    tokenizer, reference = Tokenizer(), tiktoken.get_encoding("r50k_base")
    assert tokenizer.encode(TEXTS) == reference.encode(TEXTS)
    assert tokenizer.end_of_text == reference.eot_token


def test_end_of_text_in_text_is_ordinary_unless_allowed():
    assert LEARNED.encode("<|endoftext|>", allow_special=True) == [499]
    assert 499 not in LEARNED.encode("<|endoftext|>")


def test_train_equals_the_tokenizers_library():
    """`tokenizers` merges by a list of pairs, tiktoken by the ranks of tokens:
    the ids must be equal."""
    reference = tokenizers.Tokenizer(models.BPE())
    reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    reference.train_from_iterator([TEXTS[:20000]], trainers.BpeTrainer(
        vocab_size=499, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    assert LEARNED.encode(TEXTS) == reference.encode(TEXTS).ids
    assert LEARNED.n_vocab == 500


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_decode_returns_any_encoded_text(text):
    """Every byte has a token, so every text can be encoded."""
    ids = LEARNED.encode(text)
    assert LEARNED.decode(ids) == text
    assert LEARNED.token_lengths()[ids].sum() == len(text.encode())


def test_damaged_merge_table_is_rejected():
    """A checkpoint from elsewhere may hold anything: here a byte is missing, a token is there
    twice, or is not in base64."""
    lines = LEARNED.merge_table.splitlines(keepends=True)
    for damaged in (["AAAA 0\n", *lines[1:]], [*lines, lines[7]], [*lines[:-1], "!! 498\n"]):
        with pytest.raises(UserError, match="damaged"):
            Tokenizer("".join(damaged))
