"""Token shards on disk: `<data_root>/{train,val}_NNNNN.npy`, 1-D integer arrays, and `meta.json` beside them."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from gpt.errors import UserError
from gpt.files import atomic_write, read_json
from gpt.tokenizer import read_table, tokenizer_name


def token_dtype(vocab_size: int) -> type:
    """The smallest unsigned integer type that holds every token id below `vocab_size`."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_shard(data_root: str | Path, split: str, index: int, tokens: np.ndarray) -> Path:
    """Write `tokens` (1-D) as `<data_root>/<split>_<index>.npy`; the file appears only when it is complete."""
    path = Path(data_root) / f"{split}_{index:05d}.npy"
    with atomic_write(path) as file:
        np.save(file, tokens)
    return path


class ShardWriter:
    """Writes the tokens of a split into shards of `shard_size`, each under its name only when it is complete.

    What the unfinished one has so far is on disk as `.<name>.part`. Shards are numbered first, first + every, …, so
    that several writers share a folder. `shards` and `unfinished` (tokens) say where the writer stands; a new one that
    is given the same numbers goes on there, provided `sync` was called then.
    """

    HEADER = 128  # bytes before the tokens: NumPy leaves room in it for every length

    def __init__(self, data_root: str | Path, split: str, dtype: type, shard_size: int, *, first: int = 0,
                 every: int = 1, shards: int = 0, unfinished: int = 0):
        self.root, self.split, self.dtype, self.shard_size = Path(data_root), split, np.dtype(dtype), shard_size
        self.first, self.every, self.shards, self.unfinished = first, every, shards, unfinished
        self.file: BinaryIO | None = None

    def path(self, shard: int) -> Path:
        """Where a shard is, counted from 0."""
        return self.root / f"{self.split}_{self.first + shard * self.every:05d}.npy"

    def paths(self) -> tuple[Path, Path]:
        """Where the unfinished shard is, and where it will be."""
        path = self.path(self.shards)
        return path.with_name(f".{path.name}.part"), path

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """Have an OSError, such as that of a full disk, name the shard."""
        try:
            yield
        except OSError as error:
            error.filename = str(self.paths()[1])
            raise

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens (1-D). Raises OSError where they cannot be written, to a full disk for one."""
        while len(tokens):
            with self.naming():
                file, room = self.open(), self.shard_size - self.unfinished
                file.write(np.ascontiguousarray(tokens[:room], dtype=self.dtype).data)
            self.unfinished += len(tokens[:room])
            tokens = tokens[room:]
            if self.unfinished == self.shard_size:
                self.close()

    def open(self) -> BinaryIO:
        """The unfinished shard, at its end."""
        if self.file:
            return self.file
        part, path = self.paths()
        if self.unfinished and not part.exists() and path.exists():  # completed after the position was noted
            os.replace(path, part)
        size = self.HEADER + self.unfinished * self.dtype.itemsize
        if self.unfinished and (not part.exists() or part.stat().st_size < size):
            raise UserError(f"{part} is gone or too short: delete {str(self.root)!r} and prepare the data again")
        self.file = part.open("r+b" if self.unfinished else "w+b")
        self.file.truncate(size)
        self.file.seek(size)
        return self.file

    def sync(self) -> None:
        """Force what was written to disk."""
        if self.file:
            with self.naming():
                self.file.flush()
                os.fsync(self.file.fileno())

    def close(self) -> None:
        """Complete the unfinished shard, if there is one."""
        if not self.unfinished:
            return
        file = self.open()
        part, path = self.paths()
        with self.naming():
            file.seek(0)
            np.lib.format.write_array_header_1_0(file, {
                "descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.unfinished,)})
            self.sync()
            file.close()
            os.replace(part, path)
        self.file, self.shards, self.unfinished = None, self.shards + 1, 0

    def abandon(self, delete: bool) -> None:
        """Close the unfinished shard as it is, or delete all that was written."""
        if self.file:
            with contextlib.suppress(OSError):  # of a full disk, for what was not yet written
                self.file.close()
            self.file = None
        if delete:
            for path in (self.paths()[0], *map(self.path, range(self.shards))):
                path.unlink(missing_ok=True)


def write_tokenizer(data_root: str | Path, tokenizer: str) -> None:
    """Write the merge table of a tokenizer of one's own beside the shards; nothing for "gpt2"."""
    if tokenizer != "gpt2":
        with atomic_write(Path(data_root) / "tokenizer.tiktoken") as file:
            file.write(tokenizer.encode())


def write_meta(data_root: str | Path, meta: dict) -> None:
    """Write `meta.json`. Call it last: its presence says that the shards are complete."""
    with atomic_write(Path(data_root) / "meta.json") as file:
        file.write(json.dumps(meta, indent=2).encode() + b"\n")


def read_meta(data_root: str | Path) -> dict:
    """What `meta.json` says, or {} where there is none (people make shards of their own with `np.save`).

    Its "tokenizer" is what `gpt.tokenizer.get_tokenizer` takes. Raises UserError if the file is there but is not a JSON
    object, its tokenizer or vocab_size cannot be one, or a preparation has not come to its end.
    """
    path = Path(data_root) / "meta.json"
    try:
        meta = read_json(path, "a JSON object: prepare the data again, or delete this file")
    except FileNotFoundError:
        if unfinished := sorted(Path(data_root).glob("prepare_*_of_*.json")):
            raise UserError(f"{str(data_root)!r} is not prepared to its end ({unfinished[0].name}): run the same "
                            f"`python -m scripts.prepare` again, and after several parts --merge") from None
        if (path.parent / "tokenizer.tiktoken").exists():
            raise UserError(f"{path} is missing, which names the tokenizer: prepare the data again") from None
        return {}
    vocab_size = meta.get("vocab_size", 1)
    if type(vocab_size) is not int or vocab_size < 1 or not isinstance(meta.get("tokenizer", ""), str | None):
        raise UserError(f"{path} has vocab_size {vocab_size!r} and tokenizer {meta.get('tokenizer')!r}: expected a "
                        f"whole number above 0 and a name; prepare the data again, or delete this file")
    splits = meta.get("splits", {})
    if not isinstance(splits, dict) or not all(split.isidentifier() and isinstance(about, dict) and all(
            type(value) in (int, float) for value in about.values()) for split, about in splits.items()):
        raise UserError(f"{path} has splits {str(splits)[:100]}: expected the sizes of each; prepare the data again")
    if (path.parent / "tokenizer.tiktoken").is_file():
        table = read_table(path.parent)
        if (name := tokenizer_name(table)) != meta.get("tokenizer"):
            raise UserError(f"{path} has the tokenizer {meta.get('tokenizer')}, beside it lies {name}: prepare the "
                            f"data again")
        meta["tokenizer"] = table
    return meta


def read_finished(data_root: str | Path) -> dict:
    """What `meta.json` says, {} as long as a preparation has not written it."""
    return read_meta(data_root) if (Path(data_root) / "meta.json").exists() else {}


def is_complete(data_root: str | Path, meta: dict) -> bool:
    """Whether every split that `meta` tells of is there, whole."""
    try:
        return bool(meta) and all(
            about["tokens"] == sum(len(open_shard(path)) for path in Path(data_root).glob(f"{split}_*.npy"))
            for split, about in meta["splits"].items())
    except (UserError, KeyError, TypeError, AttributeError):  # damaged shards, or a meta.json of another kind
        return False


def count(meta: dict) -> str:
    """The sizes of the splits in words."""
    return " and ".join(f"{about['tokens']:,} {split} tokens" for split, about in meta["splits"].items())


def find_shards(data_root: str | Path, split: str) -> list[Path]:
    """The shards of a split in order of their numbers. Raises UserError where there are none."""
    root = Path(data_root)
    if not root.is_dir():
        raise UserError(f"data_root {str(root)!r} is not a folder: run `python prepare_shakespeare.py` first, "
                        f"or pass --data_root with the folder that holds your shards")
    paths = sorted(root.glob(f"{split}_*.npy"))
    if not paths:
        raise UserError(f"no shards for split {split} in {str(root)!r}: expected files like {split}_00000.npy; "
                        f"run `python prepare_shakespeare.py`, or pass another --data_root")
    return paths


def longest_seq_len(tokens: int) -> int:
    """The longest power of two from 32 to 256 of which a sequence fits into `tokens` tokens; 0 where none does."""
    return next((seq_len for seq_len in (256, 128, 64, 32) if tokens > seq_len), 0)


def auto_seq_len(data_root: str | Path, splits: Iterable[str]) -> int:
    """The longest seq_len up to 256 of which each split has a sequence. Raises UserError where not even 32 fits."""
    lengths = {path: len(open_shard(path)) for split in splits
               for path in [max(find_shards(data_root, split), key=lambda path: len(open_shard(path)))]}
    shortest = min(lengths, key=lambda path: lengths[path])
    if not (fits := longest_seq_len(lengths[shortest])):
        raise UserError(f"shard {shortest} has {lengths[shortest]} tokens: a sequence of 32, the shortest that "
                        f"--seq_len auto takes, needs 33; prepare more text")
    return fits


def fingerprint(paths: Iterable[Path]) -> dict[str, str]:
    """Return for each shard its length and a hash of its first and last 4,096 tokens, under its name."""
    shards = {path.name: open_shard(path) for path in paths}
    return {name: f"{len(tokens)} tokens, hash " + hashlib.sha256(
        np.concatenate([tokens[:4096], tokens[-4096:]]).astype(np.int64).tobytes()).hexdigest()[:16]
            for name, tokens in shards.items()}


def open_shard(path: str | Path) -> np.ndarray:
    """Map a shard into memory: 1-D, any integer type. Time and memory do not grow with its size.

    Raises UserError for a file that is truncated, not a NumPy array, not 1-D or not of integers.
    """
    try:
        tokens = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"shard {path} cannot be read ({reason}): it is truncated or not a .npy file; "
                        f"prepare the data again") from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        found = f"{tokens.dtype} of shape {tokens.shape}" if isinstance(tokens, np.ndarray) else "an archive"
        raise UserError(f"shard {path} holds {found}: expected a 1-D array of integers (token ids)")
    return tokens
