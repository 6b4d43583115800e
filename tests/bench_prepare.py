"""scripts.prepare against the usual recipe: python -m tests.bench_prepare --text FILE

The usual recipe is a multiprocessing.Pool whose imap takes single documents, 16 at a time, encodes each with tiktoken's
encode_ordinary, and hands back an array for the parent to copy into a shard. Both read the same lines of JSON, written
here from FILE cut into documents of about 1 kB and repeated; runs alternate, each in a fresh process. Memory is the
largest sum over a run's processes of what they have in memory, shared pages counted once (PSS).
"""

import argparse
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from gpt.tokenizer import get_tokenizer


def usual(path: Path, out: Path, processes: int) -> None:
    """The recipe, with one shard large enough for all."""
    shard, count = np.empty(400_000_000, dtype=np.uint16), 0
    with path.open("rb") as lines, multiprocessing.Pool(processes) as pool:
        for tokens in pool.imap(encode_one, (json.loads(line)["text"] for line in lines), chunksize=16):
            shard[count:count + len(tokens)] = tokens
            count += len(tokens)
    np.save(out / "train_00000.npy", shard[:count])
    print(f"{count:,} train tokens")


def encode_one(text: str) -> np.ndarray:
    encoding = get_tokenizer()
    tokens = [encoding.eot_token]
    tokens.extend(encoding.encode_ordinary(text))
    return np.array(tokens).astype(np.uint16)


def memory_of(pid: int) -> int:
    """Bytes in memory of a process and those below it."""
    try:
        pss = sum(map(int, re.findall(r"^Pss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M))) * 1024
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return 0
    return pss + sum(map(memory_of, map(int, children)))


def timed(words: list[str]) -> tuple[float, int, int]:
    """Seconds, tokens and the peak of memory of a command."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", *words], stdout=subprocess.PIPE, text=True)
    while process.poll() is None:
        peak = max(peak, memory_of(process.pid))
        time.sleep(0.1)
    seconds, printed = time.perf_counter() - began, process.stdout.read()
    assert process.returncode == 0, printed
    return seconds, int(re.search(r"([\d,]+) train tokens", printed)[1].replace(",", "")), peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="real text to cut into documents")
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--usual", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.usual:
        return usual(arguments.text, arguments.out, arguments.usual)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        text, path, size = arguments.text.read_text(), Path(folder) / "documents.jsonl", 0
        with path.open("w") as file:
            while size < arguments.megabytes * 1e6:
                for begin in range(0, len(text), 1000):
                    file.write(json.dumps({"text": text[begin:begin + 1000]}) + "\n")
                size += len(text.encode())
        print(f"{size / 1e6:.0f} MB of text in documents of 1000 characters, {os.cpu_count()} cores")
        runs: dict[str, list] = {}
        for i in range(arguments.pairs):
            for workers in (1, 2):
                for name in ("usual", "prepare"):
                    out = Path(folder) / f"{name}{workers}_{i}"
                    out.mkdir()
                    words = (["tests.bench_prepare", "--usual", str(workers), "--text", str(path), "--out", str(out)]
                             if name == "usual" else
                             ["scripts.prepare", "--num_workers", str(workers), "--input", str(path), "--out",
                              str(out / "data"), "--val_fraction", "0"])
                    runs.setdefault(f"{name}, {workers} worker{'s' * (workers > 1)}", []).append(timed(words))
                ours, theirs = (sorted(Path(folder).glob(f"{name}{workers}_{i}/**/train_*.npy"))
                                for name in ("prepare", "usual"))
                assert np.array_equal(np.concatenate([np.load(path) for path in ours]), np.load(theirs[0]))
        for name, found in runs.items():
            seconds = statistics.median(second for second, _, _ in found)
            print(f"{name:<20} {seconds:6.1f} s  {found[0][1] / seconds / 1e6:5.2f}M tokens/s  "
                  f"{size / seconds / 1e6:5.1f} MB/s  peak memory {max(peak for _, _, peak in found) / 1e6:,.0f} MB")
        for one, other in (("usual, 1 worker", "prepare, 1 worker"), ("usual, 2 workers", "prepare, 2 workers"),
                           ("prepare, 1 worker", "prepare, 2 workers")):
            ratios = sorted(a[0] / b[0] for a, b in zip(runs[one], runs[other], strict=True))
            print(f"{other} : {one} = {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
