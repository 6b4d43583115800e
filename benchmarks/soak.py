"""Kill a run repeatedly and compare its results: python -m benchmarks.soak --kills 100

One run is uninterrupted. Another with the same flags is killed with SIGKILL at random moments and
restarted, `--kills` times, before it may finish. Every logged number and every weight must equal
the first run's. With --ranks 2, torchrun starts two processes, and one of them is killed.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from gpt.checkpoint import load_checkpoint
from gpt.files import read_metrics
from gpt.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "tests" / "data" / "coriolanus.txt"  # 40 kB

# A step takes tens of milliseconds. The run validates and saves so often that a kill hits these
# about as likely as a step.
EVAL_EVERY = 2
FLAGS = f"""--device cpu --precision float32 --model.n_layer 2 --model.n_head 2 --model.n_embd 16
    --model.dropout 0.1 --seq_len 32 --micro_batch_size 4 --total_batch_size 256 --warmup_steps 4
    --max_lr 1e-2 --eval_every {EVAL_EVERY} --eval_tokens 1024 --save_every 3
    --sample_every 0""".split()


def save_shards(folder: Path) -> None:
    """Write TEXT as two shards for train and one for val."""
    tokens = np.array(Tokenizer().encode(TEXT.read_text()), dtype=np.uint16)
    np.save(folder / "train_00000.npy", tokens[:5000])
    np.save(folder / "train_00001.npy", tokens[5000:9000])
    np.save(folder / "val_00000.npy", tokens[9000:])


def start(data_root: Path, log_dir: Path, max_steps: int, ranks: int,
          output: Path) -> subprocess.Popen:
    """Start the run; what it prints goes to the file `output`."""
    words = [sys.executable]
    if ranks > 1:
        words += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    words += ["-m", "scripts.train", "--data_root", str(data_root), "--log_dir", str(log_dir),
              "--max_steps", str(max_steps), *FLAGS]
    # With one thread per process, equal work gives equal bits under any load.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(output, "w") as file:
        return subprocess.Popen(words, cwd=ROOT, env=environment, stdout=file,
                                stderr=subprocess.STDOUT)


def workers(torchrun: int) -> list[int]:
    """Return the process ids of torchrun's workers."""
    found = subprocess.run(["pgrep", "-P", str(torchrun)], capture_output=True, text=True)
    return sorted(map(int, found.stdout.split()))


def kill_again_and_again(launch: Callable[[Path], subprocess.Popen], log_dir: Path, kills: int,
                         rng: random.Random, ranks: int) -> Counter[str]:
    """Kill and restart a run `kills` times, let it finish, and return how often each phase was hit.

    launch: starts the run with its output in the given file. It trains for up to a second before
    each kill; one kill in four waits for the next save, because saves are short. With several
    ranks, a random one is killed.
    """
    output = log_dir.parent / "output.txt"
    doing = Counter[str]()
    for life in range(kills + 1):
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
            victims = workers(process.pid) if ranks > 1 else [process.pid]
            if victims:
                os.kill(rng.choice(victims), signal.SIGKILL)
            assert process.wait() != 0, f"finished before kill {life + 1}: raise --max_steps"
            doing[what_it_did(log_dir)] += 1
        # No file is ever half-written under its final name.
        assert "skipping" not in output.read_text(), output.read_text()
    assert process.wait() == 0, output.read_text()
    return doing


def what_it_did(log_dir: Path) -> str:
    """Return the phase in which a run was killed, judging by its files."""
    if list(log_dir.glob(".*.pt.tmp")):
        return "saving"
    records = read_metrics(log_dir / "metrics.jsonl")
    done = [record for record in records if record["split"] != "start"]
    if done and done[-1]["split"] == "train" and (done[-1]["step"] + 1) % EVAL_EVERY == 0:
        return "validating"
    return "training"


def read_results(log_dir: Path) -> list[dict]:
    """Return the records of metrics.jsonl, none of which may be damaged, without the speed and
    without those of the starts."""
    records = [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record.pop("tokens_per_s", None)
    return [record for record in records if record["split"] != "start"]


def assert_equal_runs(one: Path, other: Path) -> None:
    """Assert that all results and all weights of two runs are equal to the last bit."""
    for record, same in zip(read_results(one), read_results(other), strict=True):
        assert record == same, f"{record} is not {same}"
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}, "files are missing or left over"
    assert not any(name.startswith(".") for name in names), "temporary files are left over"
    for name in names:
        if name.startswith("model_"):
            weights, same = (load_checkpoint(folder / name)["model"] for folder in (one, other))
            assert weights.keys() == same.keys(), name
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
        save_shards(folder)

        def launch(output: Path, log_dir: Path = folder / "killed") -> subprocess.Popen:
            return start(folder, log_dir, args.max_steps, args.ranks, output)

        output = folder / "whole.txt"
        assert launch(output, folder / "whole").wait() == 0, output.read_text()
        began = time.time()
        doing = kill_again_and_again(launch, folder / "killed", args.kills,
                                     random.Random(args.seed), args.ranks)
        assert_equal_runs(folder / "whole", folder / "killed")
    phases = ", ".join(f"{count} while {phase}" for phase, count in sorted(doing.items()))
    print(f"{args.max_steps} steps on {args.ranks} rank(s), killed {doing.total()} times in "
          f"{time.time() - began:.0f} s ({phases}): every loss, gradient norm and weight as in the "
          f"uninterrupted run")


if __name__ == "__main__":
    main()
