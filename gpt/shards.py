"""Token shards on disk: `<data_root>/{train,val}_NNNNN.npy`, 1-D integer arrays, with `meta.json`
beside them."""

import contextlib
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt.errors import UserError
from gpt.files import atomic_write, read_json, run_lock
from gpt.tokenizer import Tokenizer


def token_dtype(vocab_size: int) -> type:
    """Return the smallest unsigned integer type that holds every token id below `vocab_size`."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_shard(data_root: str | Path, split: str, index: int, *parts: np.ndarray) -> None:
    """Write token arrays (1-D), one after the other, as `<data_root>/<split>_<index>.npy`,
    atomically.

    Raises OSError, for example if the disk is full.
    """
    header = np.lib.format.header_data_from_array_1_0(parts[0])
    header["shape"] = (sum(map(len, parts)),)
    with atomic_write(Path(data_root) / f"{split}_{index:05d}.npy") as file:
        # Not np.save: its error does not say that the disk is full.
        np.lib.format.write_array_header_1_0(file, header)
        for tokens in parts:
            file.write(tokens.data)


class ShardWriter:
    """Collect the tokens of a split and save them as shards of at most `shard_size` tokens.

    A shard ends where a document ends, unless that document is longer than a shard. `meta`, the
    content of meta.json, says how many documents the shards hold so far: to resume, write the
    documents that follow.
    """

    def __init__(self, data_root: str | Path, split: str, meta: dict, shard_size: int):
        self.data_root, self.split, self.meta = data_root, split, meta
        self.shard_size = shard_size
        self.end_of_text = meta["vocab_size"] - 1
        self.saved = {"shards": 0, "tokens": 0, "documents": 0, **meta["splits"].get(split, {})}
        self.n_documents = self.saved["documents"]  # begun so far
        self.parts: list[np.ndarray] = []  # tokens not saved yet
        self.n_pending = 0

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens (1-D), and save a shard whenever one is full. Raises OSError if that
        fails."""
        self.parts.append(tokens)
        self.n_pending += len(tokens)
        self.n_documents += self.count_documents(tokens)
        # not >=: the next token says whether a document ends here
        while self.n_pending > self.shard_size:
            self.save()

    def count_documents(self, tokens: np.ndarray) -> int:
        return int(np.count_nonzero(tokens == self.end_of_text))

    def save(self) -> None:
        """Save one shard of pending tokens."""
        parts, rest = self.parts, self.parts[0][:0]
        if self.n_pending > self.shard_size:
            pending = np.concatenate(parts)
            begins = np.flatnonzero(pending[1:self.shard_size + 1] == self.end_of_text) + 1
            n = begins[-1] if len(begins) else self.shard_size
            parts, rest = [pending[:n]], pending[n:].copy()
        write_shard(self.data_root, self.split, self.saved["shards"], *parts)
        self.parts = [rest]
        self.saved["shards"] += 1
        self.saved["tokens"] += self.n_pending - len(rest)
        self.saved["documents"] = self.n_documents - self.count_documents(rest)
        self.n_pending = len(rest)
        # meta.json counts whole documents: after an interruption, one that is cut here is written
        # again.
        if not len(rest) or rest[0] == self.end_of_text:
            self.meta["splits"][self.split] = dict(self.saved)
            write_meta(self.data_root, self.meta)

    def close(self) -> None:
        """Save the remaining tokens as the last shard."""
        if self.n_pending:
            self.save()


@contextlib.contextmanager
def dataset_folder(data_root: str | Path, tokenizer: Tokenizer, settings: dict[str, Any],
                   source: str) -> Iterator[dict[str, Any]]:
    """Lock the folder of a dataset and yield its meta.json. The block adds "splits".

    "complete" is false until the block ends; it is true from the start if the dataset exists, with
    the same `settings`. "command" finishes the dataset. A block that raises before the first shard
    leaves no files. Raises UserError if the folder holds other data or another process is writing
    to it.
    """
    root = Path(data_root)
    with run_lock(root, "out"):
        meta = read_meta(root, allow_incomplete=True)
        before = meta.get("settings", {})
        has_files = any(root.glob("*.npy")) or (root / "tokenizer.tiktoken").exists()
        if before != settings and (meta or has_files):
            changed = [f"--{name} was {value}" for name, value in before.items()
                       if name in settings and settings[name] != value and name != "inputs"]
            raise UserError(f"--out {root} holds other data "
                            f"({', '.join(changed) or 'from another input'}): choose another "
                            f"folder or delete it")
        if meta.get("complete"):
            yield meta
            return
        meta = {"complete": False, "command": shlex.join(["python", *sys.orig_argv[1:]]),
                "tokenizer": tokenizer.name, "vocab_size": tokenizer.n_vocab,
                "dtype": np.dtype(token_dtype(tokenizer.n_vocab)).name,
                "source": source, "settings": settings, "splits": {}, **meta}
        write_meta(root, meta)
        tokenizer.save(root)
        try:
            yield meta
        finally:
            if not any(root.glob("*.npy")):
                for name in ("tokenizer.tiktoken", "meta.json"):
                    (root / name).unlink(missing_ok=True)
        meta["complete"] = True
        write_meta(root, meta)


def write_meta(data_root: str | Path, meta: dict) -> None:
    with atomic_write(Path(data_root) / "meta.json") as file:
        file.write(json.dumps(meta, indent=2).encode() + b"\n")


def read_meta(data_root: str | Path, allow_incomplete: bool = False) -> dict:
    """Return the content of meta.json, {} if there is none (shards can be written with plain
    `np.save`).

    Raises UserError if it is damaged or, unless `allow_incomplete`, if the dataset is incomplete.
    """
    path = Path(data_root) / "meta.json"
    try:
        meta = read_json(path, "a JSON object: prepare the data again, or delete this file")
    except FileNotFoundError:
        if (path.parent / "tokenizer.tiktoken").exists() and not allow_incomplete:
            raise UserError(f"{path} is missing (it names the tokenizer): prepare the data "
                            f"again") from None
        return {}
    if not allow_incomplete and not meta.get("complete", True):
        raise UserError(f"data in {str(data_root)!r} is incomplete: run `{meta.get('command')}` to "
                        f"finish it")
    return meta


def read_tokenizer(data_root: str | Path, meta: dict) -> Tokenizer | None:
    """Return the tokenizer of a dataset: the one saved with the shards, else GPT-2's; None if
    `meta` names none.

    Raises UserError if it is missing, damaged, or not the one that `meta` names.
    """
    if not meta.get("tokenizer"):
        return None
    own = (Path(data_root) / "tokenizer.tiktoken").is_file()
    tokenizer = Tokenizer.load(data_root) if own else Tokenizer(meta["tokenizer"])
    if tokenizer.name != meta["tokenizer"]:
        raise UserError(f"{data_root}/meta.json names the tokenizer {meta['tokenizer']}, but "
                        f"tokenizer.tiktoken is {tokenizer.name}: prepare the data again")
    return tokenizer


def format_token_counts(meta: dict) -> str:
    """Return, for example, "304,222 train tokens and 33,803 val tokens"."""
    return " and ".join(f"{saved['tokens']:,} {split} tokens"
                        for split, saved in sorted(meta["splits"].items()))


def list_shards(data_root: str | Path, split: str) -> list[Path]:
    """Return the shards of a split, ordered by their numbers of five digits or more.

    Their names can have a prefix, as those of build-nanogpt do: edufineweb_train_000001.npy.
    """
    paths = Path(data_root).glob(f"*{split}_*.npy")
    return sorted(paths, key=lambda path: (len(path.name), path.name))


def find_shards(data_root: str | Path, split: str) -> list[Path]:
    """Return the shards of a split, ordered by number. Raises UserError if there are none."""
    paths = list_shards(data_root, split)
    if not paths:
        raise UserError(f"data_root {str(data_root)!r} has no {split}_*.npy: run "
                        f"`{prepare_command(Path(data_root))}`, or pass the folder of your shards "
                        f"as --data_root")
    return paths


def prepare_command(data_root: Path) -> str:
    """Return the command that makes a folder of shards."""
    config = f"configs/data/{data_root.name.removesuffix('_data')}.yaml"
    if "shakespeare_data" in data_root.parts:
        return "python prepare_shakespeare.py"
    if os.path.exists(config):
        return f"python -m scripts.prepare --config {config}"
    return f"python -m scripts.prepare --input FILES --out {data_root}"


def auto_seq_len(data_root: str | Path, splits: Iterable[str]) -> int:
    """Return the longest seq_len of 32, 64, 128 or 256 that fits every split. Raises UserError if
    not even 32 fits."""
    longest = [max(stat_shard(path).length for path in find_shards(data_root, split))
               for split in splits]
    for seq_len in (256, 128, 64, 32):
        if seq_len < min(longest):
            return seq_len
    raise UserError(f"a split in {str(data_root)!r} has no shard of more than {min(longest)} "
                    f"tokens, --seq_len auto needs 33: prepare more text")


def fingerprint(data_root: str | Path) -> dict[str, str]:
    """Return each shard's length and a hash of its first and last 4,096 tokens, by file name."""
    result = {}
    for path in [*list_shards(data_root, "train"), *list_shards(data_root, "val")]:
        tokens = open_shard(path)
        ends = np.concatenate([tokens[:4096], tokens[-4096:]]).astype(np.int64)
        digest = hashlib.sha256(ends.tobytes()).hexdigest()[:16]
        result[path.name] = f"{len(tokens)} tokens, hash {digest}"
    return result


class Shard(NamedTuple):
    """What it takes to read tokens from a shard without keeping the file open."""

    path: Path
    length: int  # in tokens
    dtype: np.dtype
    offset: int  # of the first token, in bytes
    modified: int  # time of the last change, in nanoseconds


def stat_shard(path: Path) -> Shard:
    """Return the `Shard` of a file. Raises UserError as `open_shard` does."""
    tokens = open_shard(path)
    return Shard(path, len(tokens), tokens.dtype, tokens.offset, os.stat(path).st_mtime_ns)


def read_tokens(shard: Shard, start: int, n: int, vocab_size: int) -> np.ndarray:
    """Return `n` tokens of a shard from position `start` on.

    Raises UserError if the file has changed since `stat_shard`, or for ids outside the vocabulary.
    """
    if os.stat(shard.path).st_mtime_ns != shard.modified:
        raise UserError(f"shard {shard.path} has changed since the start of the run: restore "
                        f"it, then rerun the same command to resume")
    offset = shard.offset + start * shard.dtype.itemsize
    tokens = np.fromfile(shard.path, shard.dtype, n, offset=offset)
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        at = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))[0]
        raise UserError(f"shard {shard.path} has token id {tokens[at]} at position {start + at}, "
                        f"expected 0 to {vocab_size - 1}: prepare the data with the model's "
                        f"tokenizer")
    return tokens


def open_shard(path: str | Path) -> np.memmap:
    """Memory-map a shard (1-D, any integer type), in time and memory that do not depend on its
    size. The file stays open as long as the array exists.

    Raises UserError if the file is truncated or is not a 1-D NumPy array of integers.
    """
    try:
        tokens = np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"shard {path} cannot be read ({reason}): it is truncated or not a .npy "
                        f"file; prepare the data again") from None
    if not isinstance(tokens, np.memmap) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise UserError(f"shard {path} is not a 1-D array of integers (token ids)")
    return tokens
