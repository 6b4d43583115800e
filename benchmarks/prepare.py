"""scripts.prepare against a multiprocessing.Pool over single documents:
python -m benchmarks.prepare --text FILE

Both tokenize the same JSON lines, FILE cut into documents of 1,000 characters and repeated,
with as many workers.
"""

import argparse
import json
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.compare import compare, python
from gpt.tokenizer import Tokenizer

TOKENIZER = Tokenizer()


def encode(text: str) -> np.ndarray:
    """Return `<|endoftext|>` and the tokens of a document, uint16."""
    return np.array([TOKENIZER.end_of_text, *TOKENIZER.encode(text)], dtype=np.uint16)


def pool(path: Path, workers: int) -> np.ndarray:
    """Return the tokens of `path`, encoded as in build-nanogpt: imap over documents, 16 at a time,
    into one array."""
    tokens, count = np.empty(path.stat().st_size, dtype=np.uint16), 0
    with path.open("rb") as lines, multiprocessing.Pool(workers) as processes:
        texts = (json.loads(line)["text"] for line in lines)
        for document in processes.imap(encode, texts, chunksize=16):
            tokens[count:count + len(document)] = document
            count += len(document)
    return tokens[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="text file to cut into documents")
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    text = args.text.read_text()
    lines = [json.dumps({"text": text[i:i + 1000]}) + "\n" for i in range(0, len(text), 1000)]
    with tempfile.TemporaryDirectory() as folder:
        path, shard, out = (Path(folder) / name for name in ("documents.jsonl", "pool.npy", "ours"))
        path.write_text("".join(lines * -(-args.megabytes * 10**6 // len(text.encode()))))

        def reference() -> float:
            t0 = time.perf_counter()
            np.save(shard, pool(path, args.workers))
            return len(np.load(shard, mmap_mode="r")) / (time.perf_counter() - t0) / 1e6

        def ours() -> float:
            shutil.rmtree(out, ignore_errors=True)
            t0 = time.perf_counter()
            python("scripts.prepare", "--input", path, "--out", out, "--val_fraction", 0,
                   "--num_workers", args.workers)
            seconds = time.perf_counter() - t0
            tokens = np.concatenate([np.load(part) for part in sorted(out.glob("train_*.npy"))])
            assert np.array_equal(tokens, np.load(shard))
            return len(tokens) / seconds / 1e6

        compare(f"{path.stat().st_size / 1e6:.0f} MB of JSON lines, {args.workers} workers",
                "M tokens/s", {"multiprocessing.Pool": reference, "scripts.prepare": ours},
                args.rounds)


if __name__ == "__main__":
    main()
