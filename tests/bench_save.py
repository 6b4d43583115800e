"""What a save costs: python -m tests.bench_save [--size gpt2] [--saves 5] [--folder .]

Training waits while a checkpoint is written. This writes one of a GPT-2 with AdamW's state again and again, and says
how long it takes, and what share of the run that is at train.py's default save_every for a given time per step.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from gpt import checkpoint
from gpt.config import SIZES, GPTConfig
from gpt.model import GPT
from gpt.optim import configure_optimizers
from scripts.train import TrainConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=list(SIZES), default="gpt2")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--folder", default=".", help="on the disk that is to be measured")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = GPT(GPTConfig(**SIZES[args.size])).to(device)
    optimizers = configure_optimizers(model, "adamw", lr=1e-9, weight_decay=0.0, betas=(0.9, 0.95))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers[0].step()
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    seconds, fingerprints = [], []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for step in range(args.saves):
            began = time.perf_counter()
            checkpoint.fingerprint(model.state_dict())
            fingerprints.append(time.perf_counter() - began)
            began = time.perf_counter()
            checkpoint.save(folder, model, optimizers, scaler, step=step)
            seconds.append(time.perf_counter() - began)
        size = sum(path.stat().st_size for path in Path(folder).glob(f"*_{args.saves - 1:05d}.pt"))
    stall, every = statistics.median(seconds) + statistics.median(fingerprints), TrainConfig().save_every
    print(f"{args.size} on {device}: {size / 1e6:,.0f} MB in {statistics.median(seconds):.2f} s (fastest "
          f"{min(seconds):.2f}, slowest {max(seconds):.2f}); comparing the weights of all ranks first "
          f"{statistics.median(fingerprints):.3f} s")
    for step_s in (0.25, 1.0, 30.0):
        print(f"at {step_s:g} s a step and save_every {every}: {100 * stall / (every * step_s):.2f} % of the time")


if __name__ == "__main__":
    main()
