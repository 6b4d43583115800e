"""scripts.train with a fault in rank 1 of the kind that no test can bring about from outside: FAULT=hang, nan or drift.

From the batch with number 6 on, rank 1 never gets its next batch, or has other weights than the others.
"""

import os
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
    if self.micro_batch == 6 and self.rank == 1:
        if os.environ["FAULT"] == "hang":
            time.sleep(1000)
        with torch.no_grad():
            built[0].wte.weight += {"nan": torch.nan, "drift": 1e-6}[os.environ["FAULT"]]
    return next_batch(self)


train.starting_model, train.DataLoaderLite.next_batch = starting_model, broken_batch
if __name__ == "__main__":
    command_line.run(train.main, train.TrainConfig)
