"""Measure a CUDA GPU in about five minutes: python -m benchmarks.gpu_check

Measures training steps and generation of GPT-2 124M. --nanogpt PATH measures nanoGPT, too.
If a part fails, its last error is printed, the others still run, and the exit status is 1.
"""

import argparse
import subprocess
import sys

import torch

TRAIN = {
    "default command": "",
    "16 x 1024": "--micro_batch_size 16 --seq_len 1024 --total_batch_size 16384",
    "64 x 1024": "--micro_batch_size 64 --seq_len 1024 --total_batch_size 65536"}
TRAIN["16 x 1024, Muon"] = f"{TRAIN['16 x 1024']} --optimizer muon"
TRAIN["64 x 1024, Muon"] = f"{TRAIN['64 x 1024']} --optimizer muon"
TRAIN["16 x 1024, deterministic"] = f"{TRAIN['16 x 1024']} --deterministic true"
COLUMNS = ("tokens/s", "MFU (%)", "peak memory (GB)")


def main() -> int:
    """Run all parts and print their results as they are measured; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nanogpt", help="a checkout of github.com/karpathy/nanoGPT")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("error: gpu-check needs a CUDA GPU", file=sys.stderr)
        return 2
    failed = False

    def run(module: str, *words: str) -> str:
        nonlocal failed
        done = subprocess.run([sys.executable, "-m", f"benchmarks.{module}", *words],
                              capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout
        failed = True
        return "failed: " + f"{done.returncode}\n{done.stderr.strip()}".splitlines()[-1]

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    print(f"{'':<26}" + "".join(f"{column:>18}" for column in COLUMNS), flush=True)
    for name, flags in TRAIN.items():
        printed = run("bench", "train", *flags.split())
        # A line is the name of a figure, 20 characters wide, and the figure.
        figures = {line[:20].strip(): line[20:].strip() for line in printed.splitlines()}
        row = "".join(f"{figures.get(column, '-'):>18}" for column in COLUMNS)
        print(f"{name:<26}{row}" if "tokens/s" in figures else f"{name}: {printed}", flush=True)
    for B in (16, 64) if args.nanogpt else ():
        printed = run("peers", "--peer", "bf16", "--nanogpt", args.nanogpt,
                      "--shape", f"12,768,12,50257,{B},1024")
        print(f"nanoGPT, {B} x 1024, tokens/s: {printed.splitlines()[-1]}", flush=True)
    print(run("bench", "generate", "--num_repeats", "3"), flush=True)
    print(f"transformers in float32, batch sizes 1 and 16, tokens/s:\n"
          f"{run('generate', '--peer')}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
