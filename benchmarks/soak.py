"""Kill a run repeatedly and compare its results: python -m benchmarks.soak --kills 100, or with --ranks 2

One run is uninterrupted. Another with the same flags is killed with SIGKILL at random moments and restarted, `--kills`
times, before it may finish. Every logged number and every weight must equal the first run's.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt import checkpoint
from gpt.tokenizer import Tokenizer
from tests.conftest import TEXT, TINY, metrics, save_shards, start, workers

# Validate and save so often that a kill hits these about as likely as a step.
OFTEN = ["--model.dropout", "0.1", "--eval_every", "2", "--eval_tokens", "1024", "--save_every", "3",
         "--sample_every", "0"]


def kill_again_and_again(launch: Callable, log_dir: Path, kills: int, rng: random.Random, ranks: int) -> Counter:
    """Kill and restart a run `kills` times, let it finish, and return how often each phase was hit.

    launch: starts the run with standard output in the given file. It trains for up to a second before each kill; one
    kill in four waits for the next save, because saves are short. With several ranks, a random one is killed.
    """
    output, doing = log_dir.parent / "output.txt", Counter[str]()
    for life in range(kills + 1):
        output.write_text("")
        process = launch(output)
        if life < kills:
            began = time.time()
            while "resuming" not in output.read_text() and "saved" not in output.read_text():
                assert time.time() < began + 120, f"the run does not start: {output.read_text()}"
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 1))
            deadline = time.time() + (rng.random() < 0.25)
            while time.time() < deadline and not list(log_dir.glob(".*.pt.tmp")):
                time.sleep(0.001)
            os.kill(rng.choice(workers(process.pid)) if ranks > 1 else process.pid, signal.SIGKILL)
            assert process.wait() != 0, f"finished before kill {life + 1}: raise --max_steps"
            doing[what_it_did(log_dir)] += 1
        assert "skipping" not in output.read_text()  # no file is ever half-written under its final name
    assert process.wait() == 0, output.read_text()
    return doing


def what_it_did(log_dir: Path) -> str:
    """Return the phase in which a run was killed, judging by its files."""
    lines = (log_dir / "metrics.jsonl").read_text().splitlines() if (log_dir / "metrics.jsonl").exists() else []
    last: dict[str, Any] = json.loads(lines[-1]) if lines and lines[-1].endswith("}") else {"split": ""}
    if list(log_dir.glob(".*.pt.tmp")):
        return "saving"
    return "validating" if last["split"] == "train" and (last["step"] + 1) % 2 == 0 else "training"


def assert_equal_runs(one: Path, other: Path) -> None:
    """Assert that all records of metrics.jsonl (except the speed) and all weights are equal to the last bit."""
    for split in ("train", "val"):
        assert metrics(one, split) == metrics(other, split)
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}, "files are missing or left over"
    for name in names:
        if name.startswith("model_"):
            weights, same = (checkpoint.load_checkpoint(folder / name)["model"] for folder in (one, other))
            assert all(torch.equal(weights[key], same[key]) for key in weights), name


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--max_steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_shards(folder, np.array(Tokenizer().encode(TEXT.read_text()), dtype=np.uint16), 5000, 9000)
        torchrun = ["torchrun", "--standalone", f"--nproc_per_node={args.ranks}"] if args.ranks > 1 else []

        def launch(output: Path, log_dir: Path = folder / "killed") -> subprocess.Popen:
            return start(*torchrun, "-m", "scripts.train", "--data_root", folder, "--log_dir", log_dir, *TINY, *OFTEN,
                         "--max_steps", args.max_steps, stdout=open(output, "w"))

        assert launch(folder / "whole.txt", folder / "whole").wait() == 0
        began = time.time()
        doing = kill_again_and_again(launch, folder / "killed", args.kills, random.Random(args.seed), args.ranks)
        assert_equal_runs(folder / "whole", folder / "killed")
    phases = ", ".join(f"{count} while {phase}" for phase, count in sorted(doing.items()))
    print(f"{args.max_steps} steps on {args.ranks} processes, killed {doing.total()} times in "
          f"{time.time() - began:.0f} s ({phases}): every loss, gradient norm and weight as in the undisturbed run")


if __name__ == "__main__":
    main()
