"""HellaSwag's examples per second, the usual way against ours: python -m tests.bench_hellaswag [--examples 100]

A model of random weights in GPT-2 124M's shape, and examples cut from tests/data/coriolanus.txt: a third as long as
those from ActivityNet, the others as those from WikiHow; contexts have 250 characters in the mean and endings 130,
which is what the size of hellaswag_val.jsonl, 12.2 MB for 10,042 examples, leaves room for. --data takes the real ones.
"""

import argparse
import random
import statistics
import time
from pathlib import Path

import torch

from gpt import hellaswag
from gpt.config import GPTConfig
from gpt.model import GPT
from gpt.tokenizer import get_tokenizer
from tests import plain_hellaswag


def make_examples(count: int, seed: int = 0) -> list[hellaswag.Example]:
    """Examples of HellaSwag's lengths: the context from one place of the play, endings from there and elsewhere."""
    text = " ".join((Path(__file__).parent / "data" / "coriolanus.txt").read_text().split())
    rng = random.Random(seed)

    def piece(low: int, high: int) -> str:
        at = rng.randrange(len(text) - high)
        return text[at:at + rng.randint(low, high)].strip()

    examples = []
    for i in range(count):
        context, ending = ((60, 250), (30, 120)) if i % 3 == 0 else ((150, 450), (60, 250))
        examples.append(hellaswag.Example(piece(*context), [piece(*ending) for _ in range(4)], rng.randrange(4)))
    return examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--data")
    parser.add_argument("--float32", action="store_true", help="without a first pass in half precision")
    parser.add_argument("--batch_tokens", type=int, default=hellaswag.BATCH_TOKENS["cpu"])
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model, encoding = GPT(GPTConfig()).eval(), get_tokenizer()
    examples = (hellaswag.load_examples(arguments.data, arguments.examples) if arguments.data
                else make_examples(arguments.examples))
    plain_hellaswag.predict(model, encoding, examples[0])  # warm-up
    speeds, ratios = {"plain": [], "ours": []}, []
    for _ in range(arguments.pairs):
        began = time.perf_counter()
        usual = {i: plain_hellaswag.predict(model, encoding, example)[:2] for i, example in enumerate(examples)}
        middle = time.perf_counter()
        dtype = torch.float32 if arguments.float32 else hellaswag.fast_dtype(torch.device("cpu"))
        ours = hellaswag.predict(model, encoding, examples, arguments.batch_tokens, dtype)
        ended = time.perf_counter()
        assert ours.tolist() == [list(usual[i]) for i in range(len(examples))], "the predictions differ"
        speeds["plain"].append(len(examples) / (middle - began))
        speeds["ours"].append(len(examples) / (ended - middle))
        ratios.append(speeds["ours"][-1] / speeds["plain"][-1])
    print(f"{len(examples)} examples, {arguments.pairs} pairs, {torch.get_num_threads()} threads, {dtype}: "
          + ", ".join(f"{name} {statistics.median(values):.2f} examples/s" for name, values in speeds.items())
          + f", ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
