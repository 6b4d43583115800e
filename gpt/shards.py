"""Token shards on disk: `<data_root>/{train,val}_NNNNN.npy`, 1-D integer arrays, and `meta.json` beside them."""

import json
from pathlib import Path

import numpy as np

from gpt.atomic import atomic_write
from gpt.errors import UserError
from gpt.serialization import read_json


def token_dtype(vocab_size: int) -> type:
    """The smallest unsigned integer type that holds every token id below `vocab_size`."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def write_shard(data_root: str | Path, split: str, index: int, tokens: np.ndarray) -> Path:
    """Write `tokens` (1-D) as `<data_root>/<split>_<index>.npy`; the file appears only when it is complete."""
    path = Path(data_root) / f"{split}_{index:05d}.npy"
    with atomic_write(path) as file:
        np.save(file, tokens)
    return path


def write_meta(data_root: str | Path, meta: dict) -> None:
    """Write `meta.json`. Call it last: its presence says that the shards are complete."""
    with atomic_write(Path(data_root) / "meta.json") as file:
        file.write(json.dumps(meta, indent=2).encode() + b"\n")


def read_meta(data_root: str | Path) -> dict:
    """What `meta.json` says, or {} where there is none (people make shards of their own with `np.save`).

    Raises UserError if the file is there but is not a JSON object, or its tokenizer or vocab_size cannot be one.
    """
    path = Path(data_root) / "meta.json"
    try:
        meta = read_json(path, "a JSON object: prepare the data again, or delete this file")
    except FileNotFoundError:
        return {}
    vocab_size = meta.get("vocab_size", 1)
    if type(vocab_size) is not int or vocab_size < 1 or not isinstance(meta.get("tokenizer", ""), str | None):
        raise UserError(f"{path} has vocab_size {vocab_size!r} and tokenizer {meta.get('tokenizer')!r}: expected a "
                        f"whole number above 0 and a name; prepare the data again, or delete this file")
    return meta


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
