"""Stop a run cleanly on Ctrl-C, SIGTERM or a closed terminal."""

import contextlib
import os
import signal
import threading


class StopHandler:
    """Stores the first SIGINT, SIGTERM or SIGHUP in `signum` (0 until then) for the training loop.

    A second signal ends the process immediately, except under torchrun: a cluster may signal both
    torchrun and its workers, and torchrun forwards its signal, so a worker can get the same one
    twice. An ignored SIGHUP, as under nohup, stays ignored. Outside the main thread it does
    nothing: Python allows signal handlers only there.
    """

    def __init__(self, verbose: bool):
        self.verbose = verbose
        self.signum = 0
        self.signals = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            self.signals.append(signal.SIGHUP)
        self.set_handler(self)

    @property
    def requested(self) -> bool:
        """Whether the run should stop after its current step."""
        return self.signum > 0

    def set_handler(self, handler: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for signum in self.signals:
                signal.signal(signum, handler)  # type: ignore[arg-type]

    def __call__(self, signum: int, frame: object) -> None:
        self.signum = signum
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self.set_handler(signal.SIG_IGN if under_torchrun else signal.SIG_DFL)
        repeat = "" if under_torchrun else " (repeat to exit immediately)"
        text = f"{signal.Signals(signum).name}: finishing this step and saving{repeat}\n"
        if self.verbose:
            with contextlib.suppress(OSError):  # not print: the signal may interrupt one
                os.write(1, text.encode())
