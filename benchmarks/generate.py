"""Greedy generation with a KV cache in float32, against transformers: python -m benchmarks.generate

Both are GPT-2 124M with random weights and alternate, each in a separate process.
Other flags go to benchmarks.bench.
"""

import argparse
import statistics
import time
from functools import partial

import torch

from benchmarks.compare import compare, rate


def transformers(B: int, max_new_tokens: int, num_repeats: int) -> float:
    """Return the median tokens/s of transformers' generate for B prompts of one token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval().to("cuda" if torch.cuda.is_available() else "cpu")
    idx, seconds = torch.zeros(B, 1, dtype=torch.int64, device=model.device), []
    for _ in range(num_repeats):
        t0 = time.perf_counter()
        model.generate(idx, attention_mask=torch.ones_like(idx), min_new_tokens=max_new_tokens,
                       max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0).cpu()
        seconds.append(time.perf_counter() - t0)
    return B * max_new_tokens / statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    # Run transformers in this process.
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    for B in args.batch_sizes:
        if args.peer:
            print(transformers(B, args.max_new_tokens, num_repeats=3))
            continue
        words = ["--batch_sizes", B, "--max_new_tokens", args.max_new_tokens]
        compare(f"{B} x {args.max_new_tokens} tokens", "tokens/s", {
            "transformers": partial(rate, "benchmarks.generate", "--peer", *words),
            "ours": partial(rate, "benchmarks.bench", "generate", "--dtypes", "float32",
                            "--num_repeats", 3, *words, *flags)}, args.rounds)


if __name__ == "__main__":
    main()
