"""Byte-pair encoding, offline: GPT-2's, and tokenizers of one's own.

A tokenizer is named by one string, which data, checkpoints and functions carry: "gpt2", or its whole merge table in
tiktoken's form, a line for each token: its bytes in base64, a space, its rank. All of them cut text into pieces as
GPT-2 does, and have `<|endoftext|>` as their last token.
"""

import base64
import functools
import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import load_tiktoken_bpe

from gpt.errors import UserError

END_OF_TEXT = "<|endoftext|>"

# GPT-2's 50,256 merges as a tiktoken table, with the hash that tiktoken publishes for r50k_base.
MERGES = Path(__file__).with_name("r50k_base.tiktoken")
MERGES_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

# How text is cut into pieces before merging (Radford et al. 2019, section 2.2): contractions, words, numbers, other
# characters, each with one leading space, and runs of white space. tiktoken's r50k_base has the same expression.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def new_tokenizer(tokenizer: str = "gpt2") -> tiktoken.Encoding:
    """The encoding of "gpt2", equal to `tiktoken.get_encoding("gpt2")` but without a network, or of a merge table.

    GPT-2 has 50,257 tokens. Raises UserError for another name, or a table that is damaged.
    """
    if tokenizer == "gpt2":
        table = load_tiktoken_bpe(str(MERGES), expected_hash=MERGES_SHA256)
    else:
        if "\n" not in tokenizer:
            raise UserError(f"unknown tokenizer {tokenizer!r}: its merge table is not here; prepare the data again")
        try:
            pairs = [line.split() for line in tokenizer.splitlines()]
            table = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
            if sorted(table.values()) != [*range(len(pairs))] or not all(bytes([i]) in table for i in range(256)):
                raise ValueError("ranks or bytes are missing, or there twice")
        except ValueError as error:
            raise UserError(f"a tokenizer's merge table is damaged ({error})") from None
    return tiktoken.Encoding(name=tokenizer_name(tokenizer), pat_str=PATTERN, mergeable_ranks=table,
                             special_tokens={END_OF_TEXT: len(table)}, explicit_n_vocab=len(table) + 1)


def tokenizer_name(tokenizer: str) -> str:
    """A name to show and to compare: "gpt2", or for a merge table `bpe<number of tokens>-<its hash>`."""
    if "\n" not in tokenizer:
        return tokenizer
    return f"bpe{tokenizer.count(chr(10)) + 1}-{hashlib.sha256(tokenizer.encode()).hexdigest()[:8]}"


get_tokenizer = functools.cache(new_tokenizer)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> str:
    """Learn a byte-level BPE of `vocab_size` tokens, `<|endoftext|>` among them, from texts; the merge table.

    It is smaller than asked where the texts have no more pairs to merge. Raises UserError for a size below 257.
    """
    if not 257 <= vocab_size <= 2**24:
        raise UserError(f"vocab_size is {vocab_size}: it must be at least 257, the 256 bytes and {END_OF_TEXT}, and at "
                        f"most {2**24}")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # cuts text with GPT-2's expression
    learner.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    byte_of = {letter: byte for byte, letter in enumerate(BYTE_LETTERS)}
    tokens = sorted(learner.get_vocab().items(), key=lambda item: item[1])  # the bytes, then in the order of merging
    return "".join(f"{base64.b64encode(bytes(byte_of[letter] for letter in token)).decode()} {rank}\n"
                   for rank, (token, _) in enumerate(tokens))


def read_table(folder: str | Path) -> str:
    """The merge table in `folder`/tokenizer.tiktoken. Raises UserError if it cannot be read or is damaged."""
    path = Path(folder) / "tokenizer.tiktoken"
    if not path.is_file():
        raise UserError(f"unknown tokenizer {str(folder)!r}: expected 'gpt2', or a folder that "
                        f"`python -m scripts.train_tokenizer` wrote")
    try:
        table = path.read_text(encoding="ascii")
        new_tokenizer(table)
    except (OSError, UnicodeDecodeError, UserError) as error:
        raise UserError(f"{path} is not a tokenizer ({error})") from None
    return table


def token_lengths(encoding: tiktoken.Encoding, size: int = 0) -> np.ndarray:
    """How many bytes of text each token stands for, int64, `size` of them if those are more than the encoding has:
    0 for `<|endoftext|>`, which stands between texts, and for what is no token."""
    lengths = np.zeros(max(encoding.n_vocab, size), dtype=np.int64)
    for token, rank in ranks(encoding).items():
        lengths[rank] = len(token)
    return lengths


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
            merged = [known.get(left + right, rank) for left, right in itertools.pairwise(parts)]
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
