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
def only_run_in(log_dir: str | Path) -> Iterator[None]:
    """Hold the lock of `log_dir`, and clear away what a killed process left half-written there.

    The system releases the lock when the process ends, however that happens.

    Raises UserError that says who holds it, if another process does.
    """
    path, holder = Path(log_dir) / ".lock", Path(log_dir) / ".lock_holder"
    lock = FileLock(path)
    try:
        lock.acquire(timeout=2)  # a process that is just being killed still has it
    except Timeout:
        who = holder.read_text().strip() if holder.exists() else "another process"
        raise UserError(f"log_dir {str(log_dir)!r} is in use by {who}: wait for that run, stop it, or pass another "
                        f"--log_dir") from None
    try:
        holder.write_text(f"process {os.getpid()} on {socket.gethostname()}, which began {time.ctime()}\n")
        remove_leftovers(log_dir)
        yield
    finally:
        for file in (holder, path):
            with contextlib.suppress(OSError):  # Windows keeps what is open
                file.unlink()
        lock.release()
