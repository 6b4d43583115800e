"""Stop a run cleanly on Ctrl-C, SIGTERM or a closed terminal."""

import contextlib
import os
import signal


class StopHandler:
    """Stores the first SIGINT, SIGTERM or SIGHUP in `signum` (0 until then) for the training loop to read.

    A second signal ends the process immediately. An ignored SIGHUP, as under nohup, stays ignored. Before the first
    completed step there is nothing new to save and compilation may take minutes, so the first signal exits immediately
    with status 128 + signum; the loop sets `has_unsaved_steps` after it.

    Under torchrun later signals are ignored: a cluster may signal torchrun and its workers, and torchrun forwards its
    signal, so a worker can get the same signal twice. torchrun kills workers that take too long.
    """

    def __init__(self, verbose: bool):
        self.verbose, self.signum, self.has_unsaved_steps = verbose, 0, False
        self.signals = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            self.signals.append(signal.SIGHUP)
        for signum in self.signals:
            signal.signal(signum, self)

    def __call__(self, signum: int, frame: object) -> None:
        self.signum = signum
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        for later in self.signals:
            signal.signal(later, signal.SIG_IGN if under_torchrun else signal.SIG_DFL)
        if self.has_unsaved_steps:
            text = "finishing this step and saving" + ("" if under_torchrun else " (repeat to exit immediately)")
        else:
            text = "stopping before the first completed step: there is nothing new to save"
        if self.verbose:
            with contextlib.suppress(OSError):  # not print, which may be what the signal interrupted
                os.write(1, f"{signal.Signals(signum).name}: {text}\n".encode())
        if not self.has_unsaved_steps:
            raise SystemExit(128 + signum)
