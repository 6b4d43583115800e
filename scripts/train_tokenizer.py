"""Train a BPE tokenizer on text:
python -m scripts.train_tokenizer --input my_texts --out my_tokenizer"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gpt.errors import UserError
from gpt.text_files import TextConfig, find_sources, read_batches
from gpt.tokenizer import Tokenizer
from scripts import cli

LONG_RUN = re.compile(r"\S{1000}|\s{1000}")


@dataclass
class TokenizerConfig(TextConfig):
    """Settings of scripts.train_tokenizer. With the text settings of scripts.prepare it trains on
    the same train split; pass --val_fraction 0 if the validation text is in separate files."""

    out: str  # output folder, new or empty
    vocab_size: int = 4096  # vocabulary size, including 256 bytes and <|endoftext|>
    max_bytes: int = 1_000_000_000  # maximum bytes of text to train on


def main(config: TokenizerConfig) -> None:
    """Train a tokenizer and write its merge table, tokenizer.tiktoken."""
    if config.max_bytes < 1:
        raise UserError(f"--max_bytes is {config.max_bytes}: must be at least 1")
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {config.out} exists and is not empty: "
                        f"choose another folder or delete it")
    n_bytes = 0

    def train_texts() -> Iterator[str]:
        nonlocal n_bytes
        for batch in read_batches(find_sources(config), config):
            for text in (text for split, _, text in batch if split == "train"):
                if n_bytes >= config.max_bytes:
                    return
                n_bytes += len(text.encode("utf-8", "replace"))
                # Training time is quadratic in the length of text without a word boundary.
                cuts = [0, *(match.end() for match in LONG_RUN.finditer(text)), len(text)]
                for i, j in itertools.pairwise(cuts):
                    yield text[i:j].encode("utf-8", "replace").decode()

    tokenizer = Tokenizer.train(train_texts(), config.vocab_size)
    if not n_bytes:
        raise UserError("the input has no text for training: lower --val_fraction")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(out)
    print(f"{config.out}: {tokenizer.n_vocab:,} tokens learned from {n_bytes:,} bytes of text")
    if tokenizer.n_vocab < config.vocab_size:
        print(f"fewer than the {config.vocab_size:,} requested: "
              f"this text has no more pairs to merge")


if __name__ == "__main__":
    cli.run_cli(main, TokenizerConfig)
