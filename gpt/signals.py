"""Leaving a run in good order on Ctrl-C and SIGTERM."""

import os
import signal
from collections.abc import Callable


class StopSignal:
    """Notes the first SIGINT or SIGTERM in `signum` (0 before it) for the loop to see; a second one ends the
    process at once, as it would without this class.

    Under torchrun later ones are ignored: a cluster may signal torchrun and its workers, and torchrun passes its own
    on, so that a worker hears the same request twice. There it is torchrun that kills what takes too long.
    """

    def __init__(self, report: Callable[[str], None]):
        self.report, self.signum = report, 0
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self)

    def __call__(self, signum: int, frame) -> None:
        self.signum = signum
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, signal.SIG_IGN if under_torchrun else signal.SIG_DFL)
        hint = "" if under_torchrun else "; once more to leave at once"
        self.report(f"{signal.Signals(signum).name}: finishing this step and saving{hint}")
