"""Atomic writes, JSON files, .pt files with verified checksums, and the lock of a folder."""

import contextlib
import json
import os
import re
import socket
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from gpt.errors import UserError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a file for writing bytes; it appears as `path` when the block ends without an exception.

    The bytes go to `.<name>.tmp` in the same folder, are synced to disk, and replace `path` in one step (`os.replace`):
    a crash leaves the old file or the new one. An exception in the block removes the temporary file; a killed process
    leaves it for `run_lock` to remove. An OSError, for example on a full disk, names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)
        raise
    if os.name == "posix":  # the rename must survive a power failure, too; Windows cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_json(path: Path, description: str) -> dict:
    """Return the JSON object in a file; `description` says what it is, for the error.

    Raises UserError if it is not a JSON object, FileNotFoundError if there is no file.
    """
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, not an object")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not {description} ({error})") from None
    return content


def read_metrics(path: str | Path) -> list[dict]:
    """Return the records of a metrics.jsonl; skip broken lines, such as the last one of a killed run."""
    records = []
    lines = Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "split" in record and all(isinstance(record.get(key), int | float) for key in (
                "step", "acc" if record["split"] == "hellaswag" else "loss")):
            records.append(record)
    return records


def save_pt(path: Path, content: dict) -> None:
    """Write a dictionary of tensors and plain values, atomically, with every tensor on the CPU.

    Raises OSError if the file cannot be written, for example on a full disk.
    """
    import torch  # takes a second, and prepare_shakespeare.py does not need it

    try:
        with atomic_write(path) as file:
            torch.save(to_cpu(content), file)
    except RuntimeError as error:  # torch.save hides an OSError behind an error about file positions
        if isinstance(error.__context__, OSError):
            raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from None
        raise


def to_cpu(value: Any) -> Any:
    """Return `value` with every tensor in its dictionaries and lists on the CPU, so that any machine can load it."""
    if hasattr(value, "detach"):  # a tensor
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_cpu(item) for item in value)
    return value


def load_pt(path: Path) -> dict:
    """Return the content of a file written by `save_pt`, with its checksums verified: `torch.load` does not.

    Raises UserError for a file that is missing, damaged, or not a dictionary of tensors and plain values.
    """
    import torch

    if not path.is_file():
        raise UserError(f"no checkpoint {str(path)!r}: pass the path of a model_<step>.pt file")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            # A flipped bit can mark an entry as a folder, for which torch.load returns uninitialized memory.
            # torch.save leaves these attributes 0.
            broken = broken or next((entry.filename for entry in archive.infolist() if entry.external_attr), None)
        if broken:
            raise UserError(f"{path} is damaged (bad entry {broken})")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a truncated or malicious file can raise anything
        reason = re.split(r"\. |\n", str(error))[0][:120]  # without PyTorch's advice to load it unsafely
        raise UserError(f"{path} is damaged or not a .pt file ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content


@contextlib.contextmanager
def run_lock(folder: str | Path, setting: str = "log_dir") -> Iterator[None]:
    """Hold the lock of `folder`, the value of `setting`, and delete temporary files of killed processes in it.

    The system releases the lock when the process ends, however it ends. Raises UserError that names the owner if
    another process holds the lock.
    """
    path, owner_file = Path(folder) / ".lock", Path(folder) / ".lock_holder"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=2)  # a process that is being killed may still hold it
    except Timeout:
        owner = owner_file.read_text().strip() if owner_file.exists() else "another process"
        raise UserError(f"{setting} {str(folder)!r} is in use by {owner}: wait for that run, stop it, or pass another "
                        f"--{setting}") from None
    try:
        owner_file.write_text(f"process {os.getpid()} on {socket.gethostname()}, started {time.ctime()}\n")
        for temporary in Path(folder).glob(".*.tmp"):
            temporary.unlink()
        yield
    finally:
        for file in (owner_file, path):
            with contextlib.suppress(OSError):  # Windows keeps open files
                file.unlink()
        lock.release()
