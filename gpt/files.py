"""Atomic writes, JSON files, .pt files with verified checksums, and the lock of a folder."""

import contextlib
import json
import os
import re
import socket
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from gpt.errors import UserError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a file for writing bytes; it appears as `path` when the block ends without an exception.

    The bytes go to `.<name>.tmp` in the same folder, are synced to disk, and replace `path` in one
    step (`os.replace`): a crash or a power failure leaves the old file or the new one. An exception
    in the block removes the temporary file; a killed process leaves it, and the next write to
    `path` overwrites it. An OSError, for example on a full disk, names `path`.
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


def read_json(path: Path, description: str) -> dict:
    """Return the JSON object in a file; `description` says what it is, for the error.

    Raises UserError if it is not a JSON object, FileNotFoundError if there is no file.
    """
    data = path.read_bytes()
    try:
        content = json.loads(data)
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, not an object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not {description} ({error})") from None
    return content


def parse_record(line: bytes) -> dict | None:
    """Return the record in a line of a metrics.jsonl; None if the line is damaged, as the last one
    of a killed run can be."""
    try:
        record = json.loads(line)
        is_valid = isinstance(record["step"], int) and isinstance(record["split"], str)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return record if is_valid else None


def read_metrics(path: str | Path) -> list[dict]:
    """Return the records of a metrics.jsonl, [] if there is none."""
    if not Path(path).exists():
        return []
    with open(path, "rb") as file:
        return [record for line in file if (record := parse_record(line))]


def save_pt(path: Path, content: dict) -> None:
    """Write a dictionary of tensors and plain values, atomically, with every tensor on the CPU.

    Raises OSError if the file cannot be written, for example on a full disk.
    """
    import torch  # takes a second, and prepare_shakespeare.py does not need it

    try:
        with atomic_write(path) as file:
            torch.save(to_cpu(content), file)
    except RuntimeError as error:  # torch.save raises this when writing fails with an OSError
        cause: BaseException = error
        while cause.__context__:
            cause = cause.__context__
        raise cause from None


def to_cpu(value: Any) -> Any:
    """Return `value` with all tensors in its dictionaries and lists on the CPU, so that any machine
    can load it."""
    if hasattr(value, "detach"):  # a tensor
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_cpu(item) for item in value)
    return value


def load_pt(path: Path) -> dict:
    """Return the content of a file written by `save_pt`, after verifying its checksums, which
    `torch.load` does not do.

    Raises UserError for a file that is missing, damaged, or not a dictionary of tensors and plain
    values.
    """
    import torch

    if not path.is_file():
        raise UserError(f"no checkpoint {str(path)!r}: pass the path of a model_<step>.pt file")
    try:
        with zipfile.ZipFile(path) as archive:
            # torch.save never compresses: a small file could unpack to gigabytes. Nor does it set
            # attributes: for an entry marked as a folder torch.load returns uninitialized memory.
            unusual = [entry.filename for entry in archive.infolist()
                       if entry.compress_type != zipfile.ZIP_STORED or entry.external_attr]
            damaged = unusual[0] if unusual else archive.testzip()
        if damaged:
            raise ValueError(f"bad entry {damaged}")
        # build-nanogpt stores its config as an object: a harmless class takes its place.
        with torch.serialization.safe_globals([(SimpleNamespace, "__main__.GPTConfig")]):
            content = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a dictionary")
    except Exception as error:  # a truncated or malicious file can raise anything
        reason = re.split(r"\. |\n", str(error))[0][:120]  # without advice to load unsafely
        raise UserError(f"{path} is damaged or not a .pt file ({reason})") from None
    return content


@contextlib.contextmanager
def run_lock(folder: str | Path, setting: str = "log_dir",
             enabled: bool = True) -> Iterator[Callable[[], None]]:
    """Hold the lock of `folder`, the value of `setting`, and create the folder if it is missing.

    Yields a function to call before writing to the folder: it raises UserError if the folder has
    been moved, removed or replaced since. The lock of a killed process is free again. Does nothing
    unless `enabled`. Raises UserError if another process holds the lock or the folder is not
    writable.
    """
    if not enabled:
        yield lambda: None
        return
    folder = Path(folder)
    owner_file = folder / ".lock_owner"
    owner = f"process {os.getpid()} on {socket.gethostname()}, started {time.ctime()}"
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = acquire_lock(folder)
        owner_file.write_text(owner)
    except Timeout:
        holder = owner_file.read_text() if owner_file.exists() else "another process"
        raise UserError(f"{setting} {str(folder)!r} is in use by {holder}: wait for that run, stop "
                        f"it, or pass another --{setting}") from None
    except OSError as error:
        raise UserError(f"cannot write to {setting} {str(folder)!r} ({error.strerror}): pass "
                        f"another --{setting}") from None

    def is_held() -> bool:
        try:
            return owner_file.read_text() == owner
        except (FileNotFoundError, NotADirectoryError):
            return False

    def assert_held() -> None:
        if not is_held():
            raise UserError(f"{setting} {str(folder)!r} was moved, removed or replaced: stopped "
                            f"without writing to it; to resume, pass the folder's new path")

    try:
        yield assert_held
    finally:
        with contextlib.suppress(OSError):  # a file in use on Windows; a folder that is not empty
            if is_held():
                for file in (owner_file, folder / ".lock", folder / ".soft_lock"):
                    file.unlink(missing_ok=True)
                if is_new:
                    folder.rmdir()
        lock.release()


def acquire_lock(folder: Path) -> BaseFileLock:
    """Return the acquired lock of `folder`. Raises `filelock.Timeout` if another process has it."""
    try:
        lock: BaseFileLock = FileLock(folder / ".lock")
        lock.acquire(timeout=2)  # a process that is being killed may still hold it
    except Timeout:
        raise
    except OSError:  # some network file systems have no locks: mark the folder with a file instead
        lock = SoftFileLock(folder / ".soft_lock")
        lock.acquire(timeout=2)
    return lock
