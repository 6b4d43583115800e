"""scripts.train with a fault that no test can cause from outside: FAULT=hang, nan, drift or evaluation.

At step 6 rank 1 never gets its next batch, or has other weights than rank 0; or a validation raises.
"""

import os
import sys
import time
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parents[1])

from gpt.checkpoint import CheckpointManager  # noqa: E402
from gpt.dataloader import DataLoaderLite  # noqa: E402
from scripts import cli, train  # noqa: E402

FAULT, resume, batch, models = os.environ["FAULT"], CheckpointManager.resume, DataLoaderLite.batch, []


def resume_and_keep(self, model, *args):
    models.append(model)
    return resume(self, model, *args)


def faulty_batch(self, step, micro_step):
    if step == 6 and self.rank == 1:
        if FAULT == "hang":
            time.sleep(1000)
        with torch.no_grad():
            models[0].wte.weight += {"nan": torch.nan, "drift": 1e-6}[FAULT]
    return batch(self, step, micro_step)


def faulty_evaluation(*args):
    raise RuntimeError("evaluation failed")


CheckpointManager.resume = resume_and_keep
if FAULT == "evaluation":
    train.evaluate_loss = faulty_evaluation
else:
    DataLoaderLite.batch = faulty_batch
if __name__ == "__main__":
    cli.run_cli(train.main, train.TrainConfig)
