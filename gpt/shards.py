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

COUNT_SIZE = 2**20  # tokens counted per pass; fits the CPU's cache


def token_dtype(vocab_size: int) -> type:
    """Return the smallest unsigned integer type that holds every token id below `vocab_size`."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_shard(data_root: str | Path, split: str, index: int, *parts: np.ndarray) -> None:
    """Write token arrays (1-D), one after the other, as `<data_root>/<split>_<index>.npy`,
    atomically.

    Raises OSError, for example if the disk is full.
    """
    path = Path(data_root) / f"{split}_{index:05d}.npy"
    with atomic_write(path) as file:  # not np.save: its error does not say that the disk is full
        np.lib.format.write_array_header_1_0(file, {
            "descr": np.lib.format.dtype_to_descr(parts[0].dtype), "fortran_order": False,
            "shape": (sum(map(len, parts)),)})
        for tokens in parts:
            file.write(np.ascontiguousarray(tokens, parts[0].dtype).data)


class ShardWriter:
    """Collect the tokens of a split and save them as shards of at most `shard_size` tokens.

    A shard ends where a document ends, unless that document is longer than a shard. The shards are
    the only state. To resume, write from the split's document number `n_documents` (counted from
    1), the last one begun: its tokens that are already in shards are skipped.
    """

    def __init__(self, data_root: str | Path, split: str, tokenizer: Tokenizer, shard_size: int):
        self.data_root, self.split = data_root, split
        self.tokenizer = tokenizer
        self.shard_size = shard_size
        self.parts: list[np.ndarray] = []  # tokens not saved yet
        self.n_pending = self.n_shards = 0
        self.skip = 0  # tokens of the last document that are in shards
        self.counts = np.zeros(tokenizer.n_vocab, dtype=np.int64)  # how often each token occurs
        for path in list_shards(data_root, split):
            if path.name != f"{split}_{self.n_shards:05d}.npy":
                raise UserError(f"{split}_{self.n_shards:05d}.npy is missing in "
                                f"{str(data_root)!r}: delete the folder and prepare the data again")
            tokens = open_shard(path)
            begins = np.flatnonzero(tokens == tokenizer.end_of_text)
            self.skip = len(tokens) - int(begins[-1]) if len(begins) else self.skip + len(tokens)
            self.counts += count_tokens(path, tokenizer.n_vocab)
            self.n_shards += 1

    @property
    def n_documents(self) -> int:
        return int(self.counts[self.tokenizer.end_of_text])

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens (1-D), and save a shard whenever one is full. Raises OSError if that
        fails."""
        n_skipped = min(self.skip, len(tokens))
        self.skip -= n_skipped
        self.parts.append(tokens[n_skipped:])
        self.n_pending += len(self.parts[-1])
        self.counts += np.bincount(self.parts[-1], minlength=len(self.counts))
        # not >=: the next token says whether a document ends here
        while self.n_pending > self.shard_size:
            self.save()

    def save(self) -> None:
        """Save one shard of pending tokens."""
        parts, rest = self.parts, []
        if self.n_pending > self.shard_size:
            tokens = np.concatenate(parts)
            begins = np.flatnonzero(tokens[1:self.shard_size + 1] == self.tokenizer.end_of_text)
            n = int(begins[-1]) + 1 if len(begins) else self.shard_size
            parts, rest = [tokens[:n]], [tokens[n:].copy()]
        write_shard(self.data_root, self.split, self.n_shards, *parts)
        self.n_shards += 1
        self.parts, self.n_pending = rest, sum(map(len, rest))

    def close(self) -> dict[str, Any]:
        """Save the remaining tokens as the last shard and return the split's entry for
        meta.json."""
        if self.n_pending:
            self.save()
        return {"shards": self.n_shards} | split_stats(self.counts, self.tokenizer)


@contextlib.contextmanager
def dataset_folder(data_root: str | Path, tokenizer: Tokenizer, settings: dict[str, Any],
                   source: str) -> Iterator[dict[str, Any]]:
    """Lock the folder of a dataset and yield its meta.json, which the block completes by adding
    "splits".

    Until then the file has `"complete": false` and the command that finishes the dataset. If the
    dataset is already complete, with the same `settings`, "splits" exists. A block that raises
    before the first shard leaves no files. Raises UserError if the folder holds other data or
    another process is writing to it.
    """
    root, began = Path(data_root), False
    with run_lock(root, "out"):
        meta = read_meta(root, allow_incomplete=True)
        before = meta.get("settings") or {}
        has_files = any(root.glob("*.npy")) or (root / "tokenizer.tiktoken").exists()
        if before != settings and (meta or has_files):
            names = [name for name in settings if name in before and name != "inputs"]
            changed = [f"--{name} was {before[name]}" for name in names
                       if before[name] != settings[name]]
            difference = ", ".join(changed) or "from another input"
            raise UserError(f"--out {root} holds other data ({difference}): choose another "
                            f"folder or delete it")
        if not is_complete(root, meta):
            began = True
            meta = {"complete": False, "command": shlex.join(["python", *sys.orig_argv[1:]]),
                    "tokenizer": tokenizer.name, "vocab_size": tokenizer.n_vocab,
                    "dtype": np.dtype(token_dtype(tokenizer.n_vocab)).name,
                    "source": source, "settings": settings}
            write_meta(root, meta)
            tokenizer.save(root)
        try:
            yield meta
        finally:
            if began and not any(root.glob("*.npy")):
                for name in ("tokenizer.tiktoken", "meta.json"):
                    (root / name).unlink(missing_ok=True)
        if began:
            write_meta(root, {**meta, "complete": True})


def split_stats(counts: np.ndarray, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the numbers of tokens, documents and text bytes of a split in which each token occurs
    `counts` times."""
    n_tokens, n_bytes = int(counts.sum()), int(counts @ tokenizer.token_lengths())
    return {"tokens": n_tokens, "documents": int(counts[tokenizer.end_of_text]) or 1,
            "bytes": n_bytes, "bytes_per_token": round(n_bytes / max(n_tokens, 1), 4)}


def count_tokens(path: str | Path, vocab_size: int) -> np.ndarray:
    """Return how often each token id occurs in a shard: (vocab_size,), int64. Raises UserError for
    any other id."""
    tokens, counts = open_shard(path), np.zeros(vocab_size, dtype=np.int64)
    for i in range(0, len(tokens), COUNT_SIZE):
        ids = tokens[i:i + COUNT_SIZE]
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise UserError(f"shard {path} has token ids from {ids.min()} to {ids.max()}, expected "
                            f"0 to {vocab_size - 1}: prepare the data again")
        counts += np.bincount(ids, minlength=vocab_size)
    return counts


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
    vocab_size = meta.get("vocab_size", 1)
    size_is_valid = type(vocab_size) is int and vocab_size >= 1
    name_is_valid = isinstance(meta.get("tokenizer", ""), str | None)
    if not (size_is_valid and name_is_valid):
        raise UserError(f"{path} has vocab_size {vocab_size!r} and tokenizer "
                        f"{meta.get('tokenizer')!r}: expected a whole number above 0 and a name; "
                        f"prepare the data again, or delete this file")
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


def is_complete(data_root: str | Path, meta: dict) -> bool:
    """Return whether the shards have as many tokens as `meta` says. Raises UserError if one is
    damaged."""
    return "splits" in meta and all(
        stats["tokens"] == sum(len(open_shard(path)) for path in list_shards(data_root, split))
        for split, stats in meta["splits"].items())


def format_token_counts(meta: dict) -> str:
    """Return, for example, "304,222 train tokens and 33,803 val tokens"."""
    return " and ".join(f"{stats['tokens']:,} {split} tokens"
                        for split, stats in meta["splits"].items())


def list_shards(data_root: str | Path, split: str) -> list[Path]:
    """Return the shards of a split, ordered by their numbers of five digits or more."""
    paths = Path(data_root).glob(f"{split}_*.npy")
    return sorted(paths, key=lambda path: (len(path.name), path.name))


def find_shards(data_root: str | Path, split: str) -> list[Path]:
    """Return the shards of a split, ordered by number. Raises UserError if there are none."""
    root = Path(data_root)
    if not root.is_dir():
        raise UserError(f"data_root {str(root)!r} is not a folder: run "
                        f"`python prepare_shakespeare.py` first, or pass the folder of your shards "
                        f"as --data_root")
    paths = list_shards(root, split)
    if not paths:
        raise UserError(f"no shards for split {split} in {str(root)!r}: expected files like "
                        f"{split}_00000.npy; run `python prepare_shakespeare.py`, or pass another "
                        f"--data_root")
    return paths


def longest_seq_len(tokens: int) -> int:
    """Return the longest seq_len of 32, 64, 128 or 256 of which one sequence fits into `tokens`
    tokens; 0 if none."""
    return next((seq_len for seq_len in (256, 128, 64, 32) if tokens > seq_len), 0)


def auto_seq_len(data_root: str | Path, splits: Iterable[str]) -> int:
    """Return the longest seq_len of 32, 64, 128 or 256 that fits every split. Raises UserError if
    not even 32 fits."""
    longest = []
    for split in splits:
        shards = [stat_shard(path) for path in find_shards(data_root, split)]
        longest.append(max(shards, key=lambda shard: shard.length))
    shortest = min(longest, key=lambda shard: shard.length)
    fits = longest_seq_len(shortest.length)
    if not fits:
        raise UserError(f"shard {shortest.path} has {shortest.length} tokens, --seq_len auto needs "
                        f"at least 33: prepare more text or pass a smaller --seq_len")
    return fits


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


def read_tokens(shard: Shard, start: int, n: int) -> np.ndarray:
    """Return `n` tokens of a shard from position `start` on. Raises UserError if the file has
    changed since `stat_shard`."""
    with open(shard.path, "rb") as file:
        if os.fstat(file.fileno()).st_mtime_ns != shard.modified:
            raise UserError(f"shard {shard.path} has changed since the start of the run: restore "
                            f"it, then rerun the same command to resume")
        file.seek(shard.offset + start * shard.dtype.itemsize)
        return np.frombuffer(file.read(n * shard.dtype.itemsize), shard.dtype)


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
    if not isinstance(tokens, np.memmap):
        raise UserError(f"shard {path} holds an archive: expected a 1-D array of token ids")
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise UserError(f"shard {path} holds {tokens.dtype} of shape {tokens.shape}: expected a "
                        f"1-D array of integers (token ids)")
    return tokens
