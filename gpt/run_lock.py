"""One run at a time in a folder."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from gpt.atomic import remove_leftovers
from gpt.errors import UserError


@contextlib.contextmanager
def only_run_in(folder: str | Path, name: str = "log_dir", part: str = "") -> Iterator[None]:
    """Hold the lock of `folder`, the setting `name`, and clear away what a killed process left half-written there.

    part: the share of its files that is locked; then nothing is cleared away, it may be another part's. The system
    releases the lock when the process ends, however that happens.

    Raises UserError that says who holds it, if another process does.
    """
    path, holder = Path(folder) / f".lock{part}", Path(folder) / f".lock{part}_holder"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=2)  # a process that is just being killed still has it
    except Timeout:
        who = holder.read_text().strip() if holder.exists() else "another process"
        raise UserError(f"{name} {str(folder)!r} is in use by {who}: wait for that run, stop it, or pass another "
                        f"--{name}") from None
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}, which began {time.ctime()}\n")
        if not part:
            remove_leftovers(folder)
        yield
    finally:
        for file in (holder, path):
            with contextlib.suppress(OSError):  # Windows keeps what is open
                file.unlink()
        lock.release()
