"""scripts.train with a fault of the kind that no test can bring about from outside: FAULT=hang, nan, drift or dead.

At the batch with number 6 rank 1 never gets its next batch, or has other weights than the others, or dies while rank 0
is where it hears of nothing, as in a collective on a GPU.
"""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parents[1])

from scripts import command_line, train  # noqa: E402

built, next_batch = [], train.DataLoaderLite.next_batch


def starting_model(*args, original=train.starting_model):
    built.append(original(*args))
    return built[0]


def broken_batch(self):
    if self.micro_batch == 6 and os.environ["FAULT"] == "dead":
        if self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        mutex = ctypes.create_string_buffer(64)
        while True:  # the second call never returns, whatever signal comes
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
    if self.micro_batch == 6 and self.rank == 1:
        if os.environ["FAULT"] == "hang":
            time.sleep(1000)
        with torch.no_grad():
            built[0].wte.weight += {"nan": torch.nan, "drift": 1e-6}[os.environ["FAULT"]]
    return next_batch(self)


train.starting_model, train.DataLoaderLite.next_batch = starting_model, broken_batch
if __name__ == "__main__":
    command_line.run(train.main, train.TrainConfig)
