"""HellaSwag examples per second, ours against four full rows per example: python -m benchmarks.hellaswag

Random weights of GPT-2 124M, on the CPU; without --data, examples cut from a play, as long as HellaSwag's.
"""

import argparse
import time

import torch

from benchmarks.compare import compare
from gpt import hellaswag
from gpt.config import GPTConfig
from gpt.device import DTYPES, select_precision
from gpt.model import GPT
from gpt.tokenizer import Tokenizer
from tests import plain_hellaswag


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="hellaswag_val.jsonl")
    parser.add_argument("--examples", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = GPT(GPTConfig()).eval(), Tokenizer()
    examples = (hellaswag.load_examples(args.data, args.examples) if args.data
                else plain_hellaswag.make_examples(args.examples))
    choices: dict[str, torch.Tensor] = {}  # (examples, 2): the ending with the smallest sum and mean

    def reference() -> float:
        t0 = time.perf_counter()
        choices["reference"] = torch.tensor([plain_hellaswag.predict(model, tokenizer, each)[:2] for each in examples])
        return len(examples) / (time.perf_counter() - t0)

    def ours(dtype: str) -> float:
        t0 = time.perf_counter()
        choices[dtype] = hellaswag.predict(model, tokenizer, examples, hellaswag.BATCH_TOKENS["cpu"], DTYPES[dtype])
        return len(examples) / (time.perf_counter() - t0)

    ways = {"four full rows, float32": reference, "ours, float32": lambda: ours("float32")}
    if (fast := select_precision("auto", torch.device("cpu"))) != "float32":
        ways[f"ours, {fast}"] = lambda: ours(fast)
    compare(f"{len(examples)} examples", "examples/s", ways, args.rounds)
    labels = torch.tensor([example.label for example in examples])[:, None]
    for name, predictions in choices.items():
        acc, acc_norm = (predictions == labels).double().mean(0).tolist()
        same = (predictions == choices["reference"]).double().mean().item()
        print(f"  {name:<12} acc {acc:.4f}, acc_norm {acc_norm:.4f}, {same:.1%} of predictions as the reference's")


if __name__ == "__main__":
    main()
