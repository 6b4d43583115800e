"""Run scripts.train with one fault: FAULT="<place> <action> ...", such as FAULT="save SIGKILL".

Places: step (at the end of step 5), evaluation (before the second one, of step 4 in conftest.RUN),
save (as model_00008.pt is renamed into place). Actions: crash, full_disk, replace_folder, or a
signal that the process sends itself. Of two ranks, rank 1 has the fault. A job that torchrun has
restarted has none.
"""

import itertools
import os
import resource
import signal
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts import cli, train  # noqa: E402

PLACE, *ACTIONS = os.environ["FAULT"].split()
is_first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
is_faulty_rank = os.environ.get("RANK", "1") == "1"
evaluations = itertools.count(1)


def inject(place, owner, name, is_due):
    """Patch `owner.name` to inject the fault before a call if `is_due(*args)`."""
    original = getattr(owner, name)

    def faulty(*args):
        if place == PLACE and is_first_start and is_due(*args):
            if ACTIONS == ["SIGSTOP"]:
                ranks = args[2]  # of evaluate_loss
                ranks.timeout /= 600  # short, now that all ranks have started
            if is_faulty_rank:
                for action in ACTIONS:
                    act(action)
        return original(*args)

    setattr(owner, name, faulty)


def act(action):
    if action == "crash":
        raise RuntimeError("injected")
    if action == "full_disk":  # no file can grow beyond 20 kB
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    elif action == "replace_folder":
        folder = Path(sys.argv[sys.argv.index("--log_dir") + 1])
        folder.rename(folder.with_name("moved"))
        folder.mkdir()
    else:
        os.kill(os.getpid(), signal.Signals[action])


inject("step", train, "assert_finite_step", lambda step, *_: step == 5)
inject("save", os, "replace", lambda source, target: Path(target).name == "model_00008.pt")
inject("evaluation", train, "evaluate_loss", lambda *_: next(evaluations) == 2)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as without nohup

if __name__ == "__main__":
    cli.run_cli(train.main, train.TrainConfig)
