"""gpt/tokenizer.py is GPT-2's encoding, without a network."""

import inspect
import os
import subprocess
import sys

import pytest
import tiktoken_ext.openai_public
from tiktoken._educational import SimpleBytePairEncoding

from gpt.errors import UserError
from gpt.tokenizer import MERGES_SHA256, PATTERN, Tokenizer
from tests.conftest import ROOT, TEXT


def test_it_is_what_tiktoken_publishes_as_gpt2():
    """Another merge table or expression would give other ids than every GPT-2 there is."""
    published = inspect.getsource(tiktoken_ext.openai_public.r50k_base)
    assert MERGES_SHA256 in published
    assert tiktoken_ext.openai_public.r50k_pat_str == PATTERN
    tokenizer = Tokenizer()
    assert (tokenizer.name, tokenizer.n_vocab, tokenizer.end_of_text) == ("gpt2", 50257, 50256)
    assert tokenizer.encode("<|endoftext|>", allow_special=True) == [50256]
    assert tokenizer.decode(tokenizer.encode("<|endoftext|>")) == "<|endoftext|>" and 50256 not in tokenizer.encode(
        "<|endoftext|>")


def test_known_ids():
    """Ids that GPT-2's users know by heart."""
    assert Tokenizer().encode("Hello, I'm a language model,") == [15496, 11, 314, 1101, 257, 3303, 2746, 11]
    assert Tokenizer().encode("Hello world") == [15496, 995]


def test_it_merges_as_the_plain_algorithm_does():
    """tiktoken's educational byte-pair encoder, in plain Python, must find the same tokens in real text."""
    tokenizer = Tokenizer()
    plain = SimpleBytePairEncoding(pat_str=PATTERN, mergeable_ranks=tokenizer.mergeable_ranks)
    text = TEXT.read_text()[:3000] + " naïve café 東京 🙂  \t\n\n  12345 don't"
    assert tokenizer.encode(text) == plain.encode(text, visualise=None)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_it_loads_without_a_network(tmp_path):
    """A laptop on a train must be able to train."""
    code = ("import socket\n"
            "def refuse(*_): raise OSError('no network')\n"
            "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
            "from gpt.tokenizer import Tokenizer\n"
            "print(Tokenizer().encode('Hello world'))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path)})
    assert done.stdout.strip() == "[15496, 995]", done.stderr


def test_an_unknown_name_is_refused():
    with pytest.raises(UserError, match="unknown tokenizer 'cl100k'"):
        Tokenizer("cl100k")
