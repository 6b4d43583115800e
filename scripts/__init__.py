"""The commands, one per file; run them as `python -m scripts.<name>`."""

import signal
import sys

if sys.argv[0] == "-m":  # `python -m` is importing a command, which takes seconds
    # Ctrl-C exits without a traceback until `scripts.cli.run_cli` starts.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
