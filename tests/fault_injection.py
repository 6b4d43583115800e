"""Run scripts.train with one injected fault: FAULT="<place> <action>", such as FAULT="save SIGKILL".

Places: step (step 5 on the last rank), save (as model_00008.pt is renamed into place), evaluation (the third one).
Actions: crash, error, full_disk, nan, drift (of the weights), or a signal that the process sends itself.
A job that torchrun has restarted gets no fault.
"""

import itertools
import os
import resource
import signal
import sys
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parents[1])

from gpt.checkpoint import CheckpointManager  # noqa: E402
from gpt.errors import UserError  # noqa: E402
from scripts import cli, train  # noqa: E402

PLACE, ACTION = os.environ["FAULT"].split()
restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
evaluations = itertools.count(1)


def inject(place, owner, name, is_due):
    """Patch `owner.name` to inject the fault before a call if `is_due(*args)`."""
    original = getattr(owner, name)

    def faulty(*args):
        if place == PLACE and not restarted and is_due(*args):
            act(args[0])
        return original(*args)

    setattr(owner, name, faulty)


def act(owner):
    if ACTION in ("crash", "error"):
        raise {"crash": RuntimeError, "error": UserError}[ACTION]("injected")
    if ACTION == "full_disk":  # no file can grow beyond 20 kB
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    elif ACTION in ("nan", "drift"):
        with torch.no_grad():
            owner.model.wte.weight += {"nan": torch.nan, "drift": 1e-6}[ACTION]
    else:
        os.kill(os.getpid(), signal.Signals[ACTION])


inject("step", CheckpointManager, "check_update",
       lambda manager, step, *_: step == 5 and manager.dist.rank == manager.dist.world_size - 1)
inject("save", os, "replace", lambda source, target: Path(target).name == "model_00008.pt")
inject("evaluation", train, "evaluate_loss", lambda *args: next(evaluations) == 3)
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as without nohup

if __name__ == "__main__":
    cli.run_cli(train.main, train.TrainConfig)
