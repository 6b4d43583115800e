"""Leaving a run in good order on Ctrl-C, SIGTERM and the end of the terminal."""

import contextlib
import os
import signal


class StopSignal:
    """Notes the first SIGINT, SIGTERM or SIGHUP in `signum` (0 before it) for the loop to see; a second one ends the
    process at once, as it would without this class. A SIGHUP that is ignored, as under nohup, stays ignored.

    Until the loop sets `worth_saving` there is nothing that a checkpoint would not have, and a step may take minutes
    to compile: the first signal raises SystemExit there and then, with the status 128 + signum.

    Under torchrun later ones are ignored: a cluster may signal torchrun and its workers, and torchrun passes its own
    on, so that a worker hears the same request twice. There it is torchrun that kills what takes too long.
    """

    def __init__(self, speaks: bool):
        self.speaks, self.signum, self.worth_saving = speaks, 0, False
        self.handled = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
            self.handled.append(signal.SIGHUP)
        for signum in self.handled:
            signal.signal(signum, self)

    def __call__(self, signum: int, frame: object) -> None:
        self.signum = signum
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        for again in self.handled:
            signal.signal(again, signal.SIG_IGN if under_torchrun else signal.SIG_DFL)
        if self.worth_saving:
            text = "finishing this step and saving" + ("" if under_torchrun else "; once more to leave at once")
        else:
            text = "stopping before the first update, when there is nothing new to save"
        if self.speaks:
            with contextlib.suppress(OSError):  # straight to the terminal: print may be what was interrupted
                os.write(1, f"{signal.Signals(signum).name}: {text}\n".encode())
        if not self.worth_saving:
            raise SystemExit(128 + signum)
