"""Files that appear only when they are complete, and JSON files."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gpt.errors import UserError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[BinaryIO]:
    """Open a file to write bytes to; it takes the name `path` once the block has ended without an exception.

    The bytes go to `.<name>.tmp` in the same folder, are forced to disk, and replace `path` in one step
    (`os.replace`). A crash at any moment leaves either the old file or the new one. An exception in the block
    removes the temporary file; a killed process leaves it behind, for `remove_leftovers`. An OSError, such as that
    of a full disk, names `path`.
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
    if os.name == "posix":  # the new name itself must survive a power cut; Windows cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Delete what killed processes left half-written in `folder`; call it only where nobody is writing."""
    for temporary in Path(folder).glob(".*.tmp"):
        temporary.unlink()


def read_json(path: Path, what: str) -> dict:
    """The JSON object in a file that should hold `what`. Raises UserError; FileNotFoundError where there is no file."""
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError(f"a {type(content).__name__}, not an object")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not {what} ({error})") from None
    return content
