"""Byte-pair encoding, offline: GPT-2's tokenizer, and tokenizers trained on your own text."""

import base64
import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken.load import load_tiktoken_bpe

from gpt.errors import UserError
from gpt.files import atomic_write

END_OF_TEXT = "<|endoftext|>"

# GPT-2's 50,256 merges in tiktoken's format, with the hash that tiktoken publishes for r50k_base.
MERGES = Path(__file__).with_name("r50k_base.tiktoken")
MERGES_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"

# How text is split before merging (Radford et al. 2019, section 2.2): contractions, words,
# numbers and other characters, each with at most one leading space, and runs of white space.
# The same regex as in r50k_base.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class Tokenizer:
    """A byte-level BPE that splits text as GPT-2 does and has `<|endoftext|>` as its last token.

    merge_table: "gpt2", or a table in tiktoken's format: one token per line, its bytes in base64, a
    space, its rank. Checkpoints store this string. Raises UserError if it is neither.
    """

    def __init__(self, merge_table: str = "gpt2"):
        self.merge_table = merge_table
        if merge_table == "gpt2":
            self.name = "gpt2"
            self.mergeable_ranks = load_tiktoken_bpe(str(MERGES), expected_hash=MERGES_SHA256)
        else:
            self.mergeable_ranks = parse_merge_table(merge_table)
            digest = hashlib.sha256(merge_table.encode()).hexdigest()[:8]
            self.name = f"bpe{len(self.mergeable_ranks) + 1}-{digest}"
        self.end_of_text = len(self.mergeable_ranks)  # its id
        self.n_vocab = self.end_of_text + 1
        self.encoding = tiktoken.Encoding(
            self.name, pat_str=PATTERN, mergeable_ranks=self.mergeable_ranks,
            special_tokens={END_OF_TEXT: self.end_of_text})

    @classmethod
    def load(cls, source: str | Path) -> "Tokenizer":
        """Return the tokenizer "gpt2", or the one in the folder `source`.

        Raises UserError if there is none.
        """
        if source == "gpt2":
            return cls()
        path = Path(source) / "tokenizer.tiktoken"
        if not path.is_file():
            raise UserError(f"unknown tokenizer {str(source)!r}: expected 'gpt2', or a folder "
                            f"written by `python -m scripts.train_tokenizer`")
        try:
            return cls(path.read_text(encoding="ascii"))
        except (OSError, UnicodeDecodeError, UserError) as error:
            raise UserError(f"{path} is not a tokenizer ({error}): create it again") from None

    def save(self, folder: str | Path) -> None:
        """Write the merge table to `folder`/tokenizer.tiktoken;
        GPT-2's is part of this package and not written."""
        if self.name != "gpt2":
            with atomic_write(Path(folder) / "tokenizer.tiktoken") as file:
                file.write(self.merge_table.encode())

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Train a tokenizer of `vocab_size` tokens on texts;
        fewer if the texts have no more pairs to merge.

        Raises UserError for a size below 257 (256 bytes and `<|endoftext|>`) or above 2^24.
        """
        if not 257 <= vocab_size <= 2**24:
            raise UserError(f"vocab_size is {vocab_size}: must be at least 257 "
                            f"(256 bytes and {END_OF_TEXT}) and at most {2**24}")
        import tokenizers
        from tokenizers import models, pre_tokenizers, trainers

        hf_tokenizer = tokenizers.Tokenizer(models.BPE())
        # Splits text as PATTERN does.
        hf_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False)
        hf_tokenizer.train_from_iterator(texts, trainer)
        char_to_byte = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}
        vocab = hf_tokenizer.get_vocab()  # ids: the bytes, then the merges in their order
        lines = []
        for rank, token in enumerate(sorted(vocab, key=vocab.__getitem__)):
            token_bytes = bytes(map(char_to_byte.__getitem__, token))
            lines.append(f"{base64.b64encode(token_bytes).decode()} {rank}\n")
        return cls("".join(lines))

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Return the token ids of `text`; `<|endoftext|>` is ordinary text unless
        `allow_special`."""
        return self.encoding.encode(text, allowed_special="all" if allow_special else set(),
                                    disallowed_special=())

    def encode_documents(self, chunks: Iterable[tuple[bool, str]]) -> np.ndarray:
        """Return the token ids (1-D, uint32) of `chunks`: (whether a document begins here, text).

        `<|endoftext|>` goes before each document; inside one, these characters are ordinary text.
        All chunks are encoded as one string: a call per document takes 1.3 times as long for
        documents of 1 kB, twice for 200 bytes.
        """
        chunks = list(chunks)
        text = "".join(END_OF_TEXT * begins + text for begins, text in chunks)
        try:
            text.encode()
        except UnicodeEncodeError:
            # A lone surrogate, which JSON allows: U+FFFD, as in tiktoken's `encode`.
            return self.encode_documents([
                (begins, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
                for begins, text in chunks])
        if text.count(END_OF_TEXT) == sum(begins for begins, _ in chunks):
            return self.encoding.encode_to_numpy(text, allowed_special="all")
        ids = [[self.end_of_text] * begins + self.encode(text) for begins, text in chunks]
        return np.array(list(itertools.chain.from_iterable(ids)), dtype=np.uint32)

    def decode(self, ids: Iterable[int], errors: str = "replace") -> str:
        """Return the text of token ids. errors: what to do with bytes that are not UTF-8,
        as in `bytes.decode`."""
        return self.encoding.decode(list(ids), errors=errors)

    def token_lengths(self, size: int = 0) -> np.ndarray:
        """Return the number of bytes in each token (1-D, int64, at least `size`), 0 for
        `<|endoftext|>` and for ids beyond the vocabulary."""
        lengths = np.zeros(max(self.n_vocab, size), dtype=np.int64)
        for token, rank in self.mergeable_ranks.items():
            lengths[rank] = len(token)
        return lengths

    def vocab(self) -> dict[str, int]:
        """Return every token with its id, as in GPT-2's vocab.json."""
        return {bytes_to_unicode(token): rank for token, rank in self.mergeable_ranks.items()} | {
            END_OF_TEXT: self.end_of_text}

    def merges(self) -> list[tuple[str, str]]:
        """Return the pair that each longer token was merged from, in order,
        as in GPT-2's merges.txt.

        A table of ranks implies them: merge a token's bytes using the ranks below its own,
        and two parts remain.
        """
        pairs = []
        for token, rank in sorted(self.mergeable_ranks.items(), key=lambda item: item[1]):
            parts = [bytes([byte]) for byte in token]
            while len(parts) > 2:
                merged = [self.mergeable_ranks.get(left + right, rank)
                          for left, right in itertools.pairwise(parts)]
                i = merged.index(min(merged))
                parts[i:i + 2] = [parts[i] + parts[i + 1]]
            if len(parts) == 2:
                pairs.append((bytes_to_unicode(parts[0]), bytes_to_unicode(parts[1])))
        return pairs


def parse_merge_table(merge_table: str) -> dict[bytes, int]:
    """Return the rank of each token in a merge table.

    Raises UserError if it is damaged or only a tokenizer's name.
    """
    if "\n" not in merge_table:
        raise UserError(f"unknown tokenizer {merge_table!r} (no merge table): "
                        f"prepare the data again")
    try:
        pairs = [line.split() for line in merge_table.splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
        has_all_bytes = all(bytes([i]) in ranks for i in range(256))
        if sorted(ranks.values()) != [*range(len(pairs))] or not has_all_bytes:
            raise ValueError("missing or duplicate ranks or bytes")
    except ValueError as error:
        raise UserError(f"the tokenizer's merge table is damaged ({error})") from None
    return ranks


def bytes_to_unicode(token: bytes) -> str:
    """Return a token as GPT-2's files write it, one character per byte: printable Latin-1 as it is,
    the other 68 bytes as U+0100 and up."""
    return "".join(BYTE_TO_CHAR[byte] for byte in token)


PRINTABLE_BYTES = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                   *range(ord("®"), ord("ÿ") + 1)}
OTHER_BYTES = [byte for byte in range(256) if byte not in PRINTABLE_BYTES]
BYTE_TO_CHAR = [chr(byte if byte in PRINTABLE_BYTES else 256 + OTHER_BYTES.index(byte))
                for byte in range(256)]
