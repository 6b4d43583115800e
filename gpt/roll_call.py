"""Which of many ranks is to blame when a run fails: the one that raised, died or hangs, not those that wait for it.

A collective that fails says only that "a peer" is gone, and one that hangs says nothing. So ranks also talk through
torchrun's key-value store: a thread in each of them answers for it, even while the training itself is stuck.
"""

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

import torch.distributed as torch_dist

from gpt.errors import UserError

PATIENCE = 5  # seconds in which a living rank answers
ROOT = Path(__file__).resolve().parents[1]
STORE_GONE = ("torchrun has ended, or the machine of rank 0 is gone; when all processes have ended, the same command "
              "goes on from the last checkpoint")


class RollCall:
    """This rank's part in finding out what went wrong; made in the main thread.

    store: the process group's; it is cloned, as a client that waits keeps all others of its connection waiting.
    timeout: seconds without `progress` after which the run is given up.
    """

    def __init__(self, store: torch_dist.Store, rank: int, world_size: int, timeout: float):
        self.store = torch_dist.PrefixStore("roll call", store.clone())
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.main_thread = threading.get_ident()
        self.answering = threading.Lock()
        # Signals are seen here even while the main thread is deep in a collective and cannot handle them.
        self.signals, writable = os.pipe()
        os.set_blocking(self.signals, False)
        os.set_blocking(writable, False)
        signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        self.over = False
        self.progress()
        threading.Thread(target=self._watch, daemon=True).start()

    def progress(self) -> None:
        """Note that all ranks have just met."""
        self.last_progress = time.monotonic()

    def blame(self, error: Exception) -> BaseException:
        """What to raise for `error`, so that of all ranks that fail one speaks: the lowest that failed by itself.

        That is `error` itself, a UserError that names the ranks that are gone, or SystemExit, which says nothing.
        """
        with self.answering:
            self.over = True
        lost = isinstance(error, torch_dist.DistError) or (
            type(error) is RuntimeError and any(word in str(error) for word in ("gloo", "NCCL")))
        try:
            words = self._call("lost" if lost else "failed", "lost a process")
        except torch_dist.DistError:
            if lost:
                return UserError(STORE_GONE) if os.environ.get("LOCAL_RANK", "0") == "0" else SystemExit(1)
            return error
        if words is None:
            return SystemExit(1)
        if lost and "no answer" not in words:  # all are there: then only the error can tell what the matter is
            words += f" ({' '.join(str(error).split())[:500]})"
        return UserError(words) if lost else error

    def _watch(self) -> None:
        """Answer when another rank calls; call when the ranks have not met for too long; leave when all is said."""
        signalled = asked = False
        try:
            while not self.over:
                time.sleep(min(1, self.timeout / 10))
                with self.answering:
                    if not self.over and self.store.check(["called"]) and not self.store.check([str(self.rank)]):
                        self._answer("running")
                if self.store.check(["over"]) and not self.over:
                    time.sleep(1)  # torchrun blames the first process that ends: not this one
                    os._exit(1)
                waited = time.monotonic() - self.last_progress
                if waited > self.timeout and not self.over:
                    self._end(self._call("lost", f"no step has ended in {self.timeout:g} s"))
                # A collective on a GPU does not notice that a process has died: it is torchrun that does, and sends
                # SIGTERM to the others. Look who is there, before its patience of 30 s is over. If all answer, the
                # step is just a long one, and goes on.
                with contextlib.suppress(BlockingIOError):
                    signalled = bool(os.read(self.signals, 100)) or signalled
                if signalled and waited > 10 and not asked and not self.over:
                    asked = True
                    self.store.set("called", "")
                    time.sleep(PATIENCE)
                    others = [str(rank) for rank in range(self.world_size) if rank != self.rank]
                    if not self.store.check(others) and not self.over:
                        self._end(self._call("lost", f"no step has ended in {waited:.0f} s"))
        except torch_dist.DistError:
            time.sleep(2)  # at the end of a run the store may go first
            if not self.over:
                self._end(STORE_GONE if os.environ.get("LOCAL_RANK", "0") == "0" else None)

    def _end(self, words: str | None) -> None:
        """End this process, from whichever thread."""
        if words:
            print(f"error: {words}", file=sys.stderr, flush=True)
        os._exit(2)

    def _answer(self, state: str) -> None:
        """Tell the others whether this rank "failed" by itself, "lost" them or is "running", and at which line."""
        places = [(Path(frame.filename).resolve(), frame.lineno, frame.line)
                  for frame in traceback.extract_stack(sys._current_frames()[self.main_thread])]
        ours = [f"{path.relative_to(ROOT)}:{number} ({line})" for path, number, line in places
                if path.parent in (ROOT / "gpt", ROOT / "scripts") and path.name != Path(__file__).name]
        place = ours[-1] if ours else "its start"
        self.store.set(str(self.rank), json.dumps([state, place]))

    def _call(self, state: str, what: str) -> str | None:
        """Have all ranks answer, and put in words what they say; None if it is for another rank to speak."""
        self._answer(state)
        self.store.set("called", "")
        if state == "lost" or self.rank > 0:
            time.sleep(PATIENCE)
        answers = {rank: json.loads(self.store.get(str(rank))) for rank in range(self.world_size)
                   if self.store.check([str(rank)])}
        if self.rank != min(answers, key=lambda rank: (["failed", "lost", "running"].index(answers[rank][0]), rank)):
            time.sleep(PATIENCE)  # when one process has ended, torchrun ends the others: not before they have spoken
            return None
        self.store.set("over", "")
        silent = [str(rank) for rank in range(self.world_size) if rank not in answers]
        if silent:
            found = (f"no answer from rank {', '.join(silent)} of {self.world_size} (it was killed or is stopped, or "
                     f"its machine is gone)")
        else:
            places: dict[str, list[str]] = {}
            for rank, (_, place) in sorted(answers.items()):
                places.setdefault(place, []).append(str(rank))
            found = "; ".join(f"rank {', '.join(ranks)} of {self.world_size} is at {place}"
                              for place, ranks in sorted(places.items(), key=lambda item: len(item[1])))
        return (f"{what}: {found}; the same command goes on from the last checkpoint, and --rank_timeout says how "
                f"long ranks wait for each other")
