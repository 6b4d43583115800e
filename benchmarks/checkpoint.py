"""Time to save a checkpoint; time and peak memory to load Hugging Face weights:
python -m benchmarks.checkpoint
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from gpt import pretrained
from gpt.checkpoint import CheckpointManager
from gpt.config import GPT2_CONFIGS, GPTConfig
from gpt.distributed import Ranks
from gpt.model import GPT
from gpt.optim import configure_optimizer

# Run in a fresh process; on Linux /proc/self/status has the memory in use. RssAnon leaves out the
# pages of the mapped file, which the system can drop.
LOAD = r"""
import re, sys, threading, time
from transformers import GPT2LMHeadModel
from gpt.model import GPT
def used(): return int(re.search(r"RssAnon:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
before, t0, samples = used(), time.perf_counter(), [0]
def watch():
    while True:
        samples.append(used())
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
model = GPT.from_pretrained(sys.argv[1])
print(time.perf_counter() - t0, max(samples) - before, 4 * model.num_parameters())
"""


def measure_load(folder: str | Path) -> tuple[float, float, float]:
    """Load a folder in a fresh process; return seconds, growth of peak memory and size of the
    weights, both in bytes."""
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True,
                          check=True)
    seconds, peak, weights = map(float, done.stdout.split())
    return seconds, peak, weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=list(GPT2_CONFIGS), default="gpt2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=".", help="folder on the disk to measure")
    args = parser.parse_args()
    model = GPT(GPTConfig(**GPT2_CONFIGS[args.size]))
    optimizer = configure_optimizer(model, "adamw", lr=1e-9, weight_decay=0.0, betas=(0.9, 0.95))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    seconds = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        manager = CheckpointManager(Path(folder), Ranks(0, 1, torch.device("cpu")), lambda: None,
                                    model, optimizer, scaler,
                                    {"tokenizer": None, "train_config": {}, "data": {}})
        for step in range(args.rounds):
            t0 = time.perf_counter()
            manager.save(step, required=True)
            seconds.append(time.perf_counter() - t0)
        size = sum(path.stat().st_size for path in Path(folder).glob(f"*_{args.rounds - 1:05d}.pt"))
    print(f"{args.size}: a checkpoint of {size / 1e6:,.0f} MB saves in "
          f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        checkpoint = {"model": model.state_dict(), "config": vars(model.config), "tokenizer": None}
        pretrained.save_pretrained(checkpoint, Path(folder))
        load_seconds, peak, weights = measure_load(folder)
    print(f"{args.size}: {weights / 1e9:.2f} GB load in {load_seconds:.1f} s, peak memory "
          f"{peak / weights:.2f} x")


if __name__ == "__main__":
    main()
