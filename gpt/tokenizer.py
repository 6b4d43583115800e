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


def vocabulary(encoding: tiktoken.Encoding) -> dict[str, int]:
    """Every token, special ones too, with its id, as GPT-2's vocab.json has them."""
    special = {token: encoding.encode_single_token(token) for token in encoding.special_tokens_set}
    return {printable(token): rank for token, rank in ranks(encoding).items()} | special


def merges(encoding: tiktoken.Encoding) -> list[tuple[str, str]]:
    """The pair that each longer token was merged from, in order, as GPT-2's merges.txt has them.

    A table of ranks holds them implicitly: merge a token's bytes by the ranks below its own, and two parts remain.
    """
    known = ranks(encoding)
    pairs = []
    for token, rank in known.items():
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            merged = [known.get(left + right, rank) for left, right in zip(parts, parts[1:], strict=False)]
            at = merged.index(min(merged))
            parts[at:at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            pairs.append((printable(parts[0]), printable(parts[1])))
    return pairs


def ranks(encoding: tiktoken.Encoding) -> dict[bytes, int]:
    """The tokens that are not special with their ids, in the order in which byte-pair encoding prefers them."""
    special = {encoding.encode_single_token(token) for token in encoding.special_tokens_set}
    return {encoding.decode_single_token_bytes(rank): rank for rank in range(encoding.n_vocab) if rank not in special}


def printable(token: bytes) -> str:
    """A token's bytes as GPT-2's files write them, one character each: the printable ones of Latin-1 as they are, the
    other 68 as U+0100 and up."""
    return "".join(BYTE_LETTERS[byte] for byte in token)


SHOWN = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
HIDDEN = [byte for byte in range(256) if byte not in SHOWN]
BYTE_LETTERS = [chr(byte if byte in SHOWN else 256 + HIDDEN.index(byte)) for byte in range(256)]
