"""Learn a tokenizer from text: python -m scripts.train_tokenizer --input my_texts --out my_tokenizer"""

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from gpt.documents import TextConfig, find_sources, read_batches
from gpt.errors import UserError
from gpt.files import atomic_write
from gpt.tokenizer import get_tokenizer, train_tokenizer
from scripts import cli

ENDLESS = re.compile(r"\S{1000}|\s{1000}")


@dataclass
class TokenizerConfig(TextConfig):
    """Settings of scripts.train_tokenizer. With the text settings of scripts.prepare it sees only what is for training
    there: pass --val_fraction 0 if validation has an input of its own."""

    out: str  # output folder, new or empty
    vocab_size: int = 4096  # vocabulary size, with 256 bytes and <|endoftext|>
    max_bytes: int = 1_000_000_000  # maximum bytes of text to train on


def main(config: TokenizerConfig) -> None:
    """Write the merge table and what it was made from."""
    if config.max_bytes < 1:
        raise UserError(f"max_bytes is {config.max_bytes}: it must be 1 or more")
    out = Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out {config.out!r} is there already and is not empty: pass another folder, or delete it")
    read = 0

    def train_texts() -> Iterator[str]:
        nonlocal read
        with tqdm(total=1.0, disable=None, bar_format="{percentage:5.1f}%|{bar}| {elapsed}<{remaining}") as bar:
            for batch in read_batches(find_sources(config), config):
                for _, text in batch.pieces["train"]:
                    read += len(text.encode("utf-8", "replace"))
                    # A run of letters, or of blanks, without an end costs the square of its length to learn from.
                    cuts = [0, *(match.end() for match in ENDLESS.finditer(text)), len(text)]
                    yield from (text[begin:end].encode("utf-8", "replace").decode()
                                for begin, end in itertools.pairwise(cuts))
                bar.update(batch.share - bar.n)
                if read >= config.max_bytes:
                    return

    table = train_tokenizer(train_texts(), config.vocab_size)
    if not read:
        raise UserError("there is no text for training in the input: lower --val_fraction")
    encoding = get_tokenizer(table)
    settings = {"tokenizer": encoding.name, "vocab_size": encoding.n_vocab, "pattern": encoding._pat_str,
                "bytes_read": read, "settings": asdict(config)}
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / "settings.json") as file:
        file.write(json.dumps(settings, indent=2).encode() + b"\n")
    with atomic_write(out / "tokenizer.tiktoken") as file:
        file.write(table.encode())
    print(f"{config.out}: {encoding.n_vocab:,} tokens learned from {read:,} bytes of text")
    if encoding.n_vocab < config.vocab_size:
        print(f"that is less than the {config.vocab_size:,} asked for: this text has no more pairs to merge")


if __name__ == "__main__":
    cli.run_cli(main, TokenizerConfig)
