"""Run all tests and benchmarks that need a GPU, in ten minutes:
python -m benchmarks.gpu_check, or make gpu-check

Runs the tests marked `cuda`, then benchmarks.bench with GPT-2 124M. If a part fails or times out,
it is reported, the others still run, and the exit status is 1.
"""

import argparse
import os
import signal
import subprocess
import sys
import time

import torch

BUDGET, TESTS_LIMIT, BENCH_LIMIT = 570, 240, 150  # seconds
TRAIN = [("adamw", 16, 256), ("adamw", 16, 1024), ("adamw", 64, 1024), ("muon", 16, 1024),
         ("muon", 64, 1024)]
PEERS = """For comparison, on one GPU:
  64x1024, H100: 418,821 tokens/s, 36.2% MFU (plain GPT-2 with a fused loss)
  16x1024, H100: 319,727 tokens/s, 10.3 GB
  64x1024, H200: 489,700 tokens/s"""
# --quick: a tiny model that takes seconds on any device, to test this script.
QUICK = ["--model.n_layer", "2", "--model.n_head", "2", "--model.n_embd", "32",
         "--model.vocab_size", "300"]


def run(words: list[str], limit: float) -> tuple[str, str]:
    """Run `python -m …` for at most `limit` seconds; return its standard output and,
    if it failed, the reason."""
    if limit <= 0:
        return "", "not run: out of time"
    process = subprocess.Popen([sys.executable, "-m", *words], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True)
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
    """Print the tables as they are measured; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    quick = parser.parse_args().quick
    if not quick and not torch.cuda.is_available():
        print("error: gpu-check needs a CUDA GPU", file=sys.stderr)
        return 2
    t0 = time.monotonic()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"{name}, torch {torch.__version__}")
    benches = [["train", "--optimizer", optimizer, "--micro_batch_size", str(B),
                "--seq_len", str(T), "--total_batch_size", str(B * T)] for optimizer, B, T in TRAIN]
    tests = ["pytest", "-o", "addopts=", "-m", "cuda", "-q", "tests/test_cuda.py"]
    commands = [(tests, TESTS_LIMIT)]
    commands += [(["benchmarks.bench", *words, *(QUICK if quick else [])], BENCH_LIMIT)
                 for words in [*benches, ["generate", "--num_repeats", "3"]]]
    failed = False
    for words, limit in commands:
        printed, error = run(words, min(limit, BUDGET - (time.monotonic() - t0)))
        print(f"\n{printed.rstrip()}", flush=True)
        if error:
            print(f"{' '.join(words)}: {error}", flush=True)
            failed = True
    print(f"\n{PEERS}\n{time.monotonic() - t0:.0f} s in total")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
