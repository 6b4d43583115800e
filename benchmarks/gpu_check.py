"""Everything that needs a GPU, in ten minutes and one table: python -m benchmarks.gpu_check, or make gpu-check

Runs the tests marked `cuda`, then scripts.bench with GPT-2 124M. What fails or runs out of time says why in its row,
and the rest is still measured; the exit status is then 1.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time

import torch

BUDGET, TESTS_LIMIT, BENCH_LIMIT = 570, 240, 150  # seconds
TRAIN = [("adamw", 16, 256), ("adamw", 16, 1024), ("adamw", 64, 1024), ("muon", 16, 1024), ("muon", 64, 1024)]
PEERS = """Others, on one GPU:
  64x1024, H100: 418,821 tokens/s, 36.2% MFU (plain GPT-2 with a fused loss)
  16x1024, H100: 319,727 tokens/s, 10.3 GB
  64x1024, H200: 489,700 tokens/s"""
# With --quick: a model of seconds on any device, to try this script.
QUICK = ["--model.n_layer", "2", "--model.n_head", "2", "--model.n_embd", "32", "--model.vocab_size", "300"]


def run(words: list[str], limit: float) -> tuple[str, str]:
    """Run `python -m …` for at most `limit` seconds; return its standard output and, if it failed, why."""
    if limit <= 0:
        return "", "not run: the time is up"
    process = subprocess.Popen([sys.executable, "-m", *words], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, start_new_session=True)
    try:
        printed, errors = process.communicate(timeout=limit)
    except BaseException as error:  # the limit, or Ctrl-C
        os.killpg(process.pid, signal.SIGKILL)  # what it has started, too
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return process.communicate()[0], f"stopped after {limit:.0f} s"
    lines = [line for line in errors.splitlines() if line.strip()]
    return printed, f"exit status {process.returncode}: {lines[-1] if lines else ''}" if process.returncode else ""


def main() -> int:
    """Print the table as it is measured; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)
    quick = parser.parse_args().quick
    if not quick and not torch.cuda.is_available():
        print("error: gpu-check needs a CUDA GPU", file=sys.stderr)
        return 2
    began = time.monotonic()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"{name}, torch {torch.__version__}")
    printed, error = run(["pytest", "-o", "addopts=", "-m", "cuda", "-q", "tests/test_cuda.py"], TESTS_LIMIT)
    print(printed if error else "", end="")
    print(f"tests: {error or printed.strip().splitlines()[-1]}\n\n"
          f"{'shape':<14}{'optimizer':<12}{'tokens/s':>10}{'MFU':>8}{'peak memory':>14}", flush=True)
    failed = bool(error)
    benches = [(f"{B}x{T}", optimizer, ["train", "--optimizer", optimizer, "--micro_batch_size", str(B), "--seq_len",
                                        str(T), "--total_batch_size", str(B * T)]) for optimizer, B, T in TRAIN]
    benches.append(("generate", "", ["generate", "--repeats", "3"]))
    for shape, optimizer, words in benches:
        limit = min(BENCH_LIMIT, BUDGET - (time.monotonic() - began))
        printed, error = run(["scripts.bench", *words, "--json", *(QUICK if quick else [])], limit)
        if error:
            print(f"{shape:<14}{optimizer:<12}{error}", flush=True)
            failed = True
            continue
        result = json.loads(printed)
        for row in result["rows"]:
            what = shape if optimizer else f"generate {row['batch_size']}"
            mfu = f"{row['mfu']:.1%}" if optimizer else ""
            print(f"{what:<14}{optimizer or row['weights']:<12}{row['tokens_per_s']:>10,.0f}{mfu:>8}"
                  f"{result['peak_memory_mb'] / 1e3:>11.1f} GB", flush=True)
    print(f"\n{PEERS}\n{time.monotonic() - began:.0f} s in all")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
