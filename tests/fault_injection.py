"""Run scripts.train with one fault: FAULT="<place> <action>", such as FAULT="save SIGKILL".

Places: step (at the end of step 5), evaluation (before the third one), both on the last rank; save
(as model_00008.pt is renamed into place). Actions: crash, error, full_disk, nan (as the model's
weights, in an evaluation), or a signal that the process sends itself. A job that torchrun has
restarted gets no fault.
"""

import itertools
import os
import resource
import signal
import sys
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parents[1])

from gpt.errors import UserError  # noqa: E402
from scripts import cli, train  # noqa: E402

PLACE, ACTION = os.environ["FAULT"].split()
restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
is_last_rank = int(os.environ.get("RANK", 0)) == int(os.environ.get("WORLD_SIZE", 1)) - 1
evaluations = itertools.count(1)


def inject(place, owner, name, is_due):
    """Patch `owner.name` to inject the fault before a call if `is_due(*args)`."""
    original = getattr(owner, name)

    def faulty(*args):
        if place == PLACE and not restarted and is_due(*args):
            act(args[0])
        return original(*args)

    setattr(owner, name, faulty)


def act(model):
    if ACTION in ("crash", "error"):
        raise {"crash": RuntimeError, "error": UserError}[ACTION]("injected")
    if ACTION == "full_disk":  # no file can grow beyond 20 kB
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    elif ACTION == "nan":
        with torch.no_grad():
            model.wte.weight += torch.nan
    else:
        os.kill(os.getpid(), signal.Signals[ACTION])


inject("step", train, "assert_finite_step", lambda step, *_: step == 5 and is_last_rank)
inject("save", os, "replace", lambda source, target: Path(target).name == "model_00008.pt")
inject("evaluation", train, "evaluate_loss", lambda *_: next(evaluations) == 3 and is_last_rank)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as without nohup

if __name__ == "__main__":
    cli.run_cli(train.main, train.TrainConfig)
