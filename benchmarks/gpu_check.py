"""Test and measure a CUDA GPU in ten minutes: python -m benchmarks.gpu_check, or make gpu-check

Runs the tests marked `cuda`, then measures training steps and generation of GPT-2 124M and prints
them as one table. --nanogpt PATH measures nanoGPT, too. If a part fails or there is no time left
for it, it is reported, the others still run, and the exit status is 1.
"""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time

import torch

BUDGET, TESTS_LIMIT, LIMIT = 570, 200, 120  # seconds: in total, for the tests, for each other part
TRAIN = {
    "default command": "",
    "16 x 1024": "--micro_batch_size 16 --seq_len 1024 --total_batch_size 16384",
    "64 x 1024": "--micro_batch_size 64 --seq_len 1024 --total_batch_size 65536"}
TRAIN["16 x 1024, Muon"] = f"{TRAIN['16 x 1024']} --optimizer muon"
TRAIN["64 x 1024, Muon"] = f"{TRAIN['64 x 1024']} --optimizer muon"
TRAIN["16 x 1024, deterministic"] = f"{TRAIN['16 x 1024']} --deterministic true"
# --quick: a tiny model that takes seconds on any device, to test this script.
QUICK = ("--total_batch_size 256 --micro_batch_size 2 --seq_len 32 --model.n_layer 2 "
         "--model.n_head 2 --model.n_embd 32 --model.vocab_size 300")


def run(words: str, limit: float) -> tuple[str, str]:
    """Run `python -m …` for at most `limit` seconds; return its standard output and, if it failed,
    the reason."""
    if limit <= 0:
        return "", "no time left"
    process = subprocess.Popen([sys.executable, "-m", *shlex.split(words)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    try:
        printed, errors = process.communicate(timeout=limit)
    except BaseException as error:  # timeout or Ctrl-C
        os.killpg(process.pid, signal.SIGKILL)  # with its children
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return process.communicate()[0], f"stopped after {limit:.0f} s"
    if process.returncode == 0:
        return printed, ""
    lines = [line for line in errors.splitlines() if line.strip()]
    return printed, f"exit status {process.returncode}: {lines[-1] if lines else ''}"


def main() -> int:
    """Run all parts and print their results as they are measured; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nanogpt", help="a checkout of github.com/karpathy/nanoGPT")
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.quick and not torch.cuda.is_available():
        print("error: gpu-check needs a CUDA GPU", file=sys.stderr)
        return 2
    deadline, failed = time.monotonic() + BUDGET, False
    quick = f" {QUICK}" if args.quick else ""

    def measure(name: str, words: str, limit: float = LIMIT) -> str:
        nonlocal failed
        printed, error = run(words, min(limit, deadline - time.monotonic()))
        if error:
            failed = True
            print(f"{name}: {error}\n{printed}")
            return ""
        return printed

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"{name}, torch {torch.__version__}", flush=True)
    tests = "pytest -o addopts= -m cuda -q tests/test_cuda.py"
    print(measure("tests", tests, TESTS_LIMIT).strip(), flush=True)

    print(f"\n{'':<28}{'tokens/s':>12}{'MFU (%)':>12}{'peak memory (GB)':>20}")
    for name, flags in TRAIN.items():
        printed = measure(name, f"benchmarks.bench train {flags}{quick}")
        # A line is the name of a figure, 20 characters wide, and the figure.
        figures = {line[:20].strip(): line[20:].strip() for line in printed.splitlines()}
        if "tokens/s" in figures:
            print(f"{name:<28}{figures['tokens/s']:>12}{figures['MFU (%)']:>12}"
                  f"{figures['peak memory (GB)']:>20}", flush=True)
    nanogpt = shlex.quote(args.nanogpt or "")
    for B in (16, 64) if args.nanogpt else ():
        shape = "2,32,2,300,2,32" if quick else f"12,768,12,50257,{B},1024"
        name, words = f"nanoGPT, {B} x 1024", f"--peer bf16 --nanogpt {nanogpt} --shape {shape}"
        if printed := measure(name, f"benchmarks.peers {words}"):
            print(f"{name:<28}{float(printed.split()[-1]):>12.0f}", flush=True)
    print(f"\ngeneration, 128 tokens\n"
          f"{measure('generation', f'benchmarks.bench generate --num_repeats 3{quick}')}")
    rates = map(float, measure("transformers", "benchmarks.generate --peer").split())
    print(f"{'transformers':<20}" + "".join(f"{rate:>14.1f}" for rate in rates))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
