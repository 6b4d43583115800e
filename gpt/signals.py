"""Leaving a run in good order on Ctrl-C and SIGTERM."""

import signal
from collections.abc import Callable


class StopSignal:
    """Notes the first SIGINT or SIGTERM in `signum` (0 before it) for the loop to see; a second one ends the
    process at once, as it would without this class."""

    def __init__(self, report: Callable[[str], None]):
        self.report, self.signum = report, 0
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self)

    def __call__(self, signum: int, frame) -> None:
        self.signum = signum
        for again in (signal.SIGINT, signal.SIGTERM):
            signal.signal(again, signal.SIG_DFL)
        self.report(f"{signal.Signals(signum).name}: finishing this step and saving; once more to leave at once")
