"""Files that appear only when they are complete."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


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
