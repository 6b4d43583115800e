"""HellaSwag examples per second, ours against four full rows per example:
python -m benchmarks.hellaswag

GPT-2 124M with random weights, on the CPU; without --data, examples are excerpts of a play
with HellaSwag's lengths.
"""

import argparse
import copy
import time

import torch

from benchmarks import reference_hellaswag
from benchmarks.compare import compare
from gpt.config import GPTConfig
from gpt.device import DTYPES, select_precision
from gpt.generation import prepare_for_inference
from gpt.hellaswag import BATCH_TOKENS, load_examples, score_endings
from gpt.model import GPT
from gpt.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="hellaswag_val.jsonl")
    parser.add_argument("--examples", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = GPT(GPTConfig()).eval(), Tokenizer()
    models = {"float32": copy.deepcopy(model), "bf16": model, "fp16": model}
    prepare_for_inference(models["float32"], torch.float32)  # as scripts.eval_hellaswag does
    examples = (load_examples(args.data, args.examples) if args.data
                else reference_hellaswag.make_examples(args.examples))
    # (2, examples): the endings with the smallest sums and means.
    choices: dict[str, torch.Tensor] = {}

    def reference() -> float:
        t0 = time.perf_counter()
        scores = reference_hellaswag.score_endings(model, tokenizer, examples)
        choices["reference"] = scores.argmin(2)
        return len(examples) / (time.perf_counter() - t0)

    def ours(dtype: str) -> float:
        t0 = time.perf_counter()
        with torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "float32"):
            *_, (sums, counts) = score_endings(models[dtype], tokenizer, examples,
                                               BATCH_TOKENS["cpu"])
        choices[dtype] = torch.stack([sums, sums / counts]).argmin(2)
        return len(examples) / (time.perf_counter() - t0)

    ways = {"four full rows, float32": reference, "ours, float32": lambda: ours("float32")}
    if (fast := select_precision("auto", torch.device("cpu"))) != "float32":
        ways[f"ours, {fast}"] = lambda: ours(fast)
    compare(f"{len(examples)} examples", "examples/s", ways, args.rounds)
    labels = torch.tensor([example.label for example in examples])
    for name, predictions in choices.items():
        acc, acc_norm = (predictions == labels).double().mean(1).tolist()
        same = (predictions == choices["reference"]).double().mean().item()
        print(f"  {name:<12} acc {acc:.4f}, acc_norm {acc_norm:.4f}, "
              f"{same:.1%} of predictions equal the reference's")


if __name__ == "__main__":
    main()
