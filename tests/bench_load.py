"""Peak memory and time of loading Hugging Face weights: python -m tests.bench_load [--sizes gpt2 gpt2-xl]

Makes a folder of random weights for each size, loads it in a fresh process with GPT.from_pretrained, and prints the
growth of the process's peak memory against the size of the weights. Needs the weights' size in memory and on disk.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from gpt import pretrained
from gpt.config import SIZES, GPTConfig
from gpt.model import GPT

# Run in the fresh process; Linux tells the memory in use and its peak, in kB, in /proc/self/status.
LOAD = """
import re, sys, time
from gpt.model import GPT
def kilobytes(name): return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
before, began = kilobytes("VmRSS"), time.perf_counter()
model = GPT.from_pretrained(sys.argv[1])
seconds = time.perf_counter() - began
print(seconds, 1024 * (kilobytes("VmHWM") - before), 4 * model.num_parameters())
"""


def make(folder: str, size: str, kind: str) -> None:
    """A folder of random weights, as safetensors or as torch.save once wrote and now writes pytorch_model.bin."""
    with torch.device("meta"):
        model = GPT(GPTConfig(**SIZES[size]))
    weights = {name: torch.empty(tensor.shape).normal_(std=0.02) for name, tensor in model.state_dict().items()}
    pretrained.save({"model": weights, "config": vars(model.config), "tokenizer": None}, Path(folder))
    if kind != "safetensors":
        tensors = dict(pretrained.read_tensors(Path(folder)))
        (Path(folder) / "model.safetensors").unlink()
        torch.save(tensors, Path(folder) / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "bin")


def measure(folder: str | Path) -> tuple[float, float, float]:
    """Load a folder in a fresh process: seconds, growth of the peak memory, size of the weights in bytes."""
    done = subprocess.run([sys.executable, "-c", LOAD, str(folder)], capture_output=True, text=True, check=True)
    seconds, peak, weights = map(float, done.stdout.split())
    return seconds, peak, weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["gpt2"])
    parser.add_argument("--kinds", nargs="+", choices=["safetensors", "bin", "old bin"], default=["safetensors"])
    arguments = parser.parse_args()
    for size in arguments.sizes:
        for kind in arguments.kinds:
            with tempfile.TemporaryDirectory() as folder:
                make(folder, size, kind)
                seconds, peak, weights = measure(folder)
            print(f"{size}, {kind}: {weights / 1e9:.2f} GB of weights, peak {peak / 1e9:.2f} GB = "
                  f"{peak / weights:.2f} x, {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
