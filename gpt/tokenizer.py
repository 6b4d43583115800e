"""GPT-2's byte-pair encoding, offline."""

import functools
from pathlib import Path

import tiktoken
from tiktoken.load import load_tiktoken_bpe

from gpt.errors import UserError

# GPT-2's 50,256 merges as a tiktoken table, with the hash that tiktoken publishes for r50k_base.
MERGES = Path(__file__).with_name("r50k_base.tiktoken")
MERGES_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

# How text is cut into pieces before merging (Radford et al. 2019, section 2.2): contractions, words, numbers, other
# characters, each with one leading space, and runs of white space. tiktoken's r50k_base has the same expression.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@functools.cache
def get_tokenizer(name: str = "gpt2") -> tiktoken.Encoding:
    """The encoding called `name`: "gpt2", equal to `tiktoken.get_encoding("gpt2")` but without a network.

    It has 50,257 tokens; `<|endoftext|>` is 50256. Raises UserError for another name.
    """
    if name != "gpt2":
        raise UserError(f"unknown tokenizer {name!r}: this version knows 'gpt2'")
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=PATTERN,
        mergeable_ranks=load_tiktoken_bpe(str(MERGES), expected_hash=MERGES_SHA256),
        special_tokens={"<|endoftext|>": 50256},
        explicit_n_vocab=50257,
    )
