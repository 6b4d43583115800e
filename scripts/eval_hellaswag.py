"""Evaluate a model on HellaSwag: python -m scripts.eval_hellaswag,
or torchrun … scripts/eval_hellaswag.py"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt.checkpoint import CheckpointConfig, load_model
from gpt.device import DTYPES, Precision, select_precision
from gpt.distributed import init_ranks
from gpt.errors import UserError
from gpt.files import atomic_write
from gpt.generation import prepare_for_inference
from gpt.hellaswag import evaluate_hellaswag, load_examples
from scripts import cli


@dataclass
class HellaSwagConfig(CheckpointConfig):
    """Settings of scripts.eval_hellaswag; hellaswag.json is written to log_dir."""

    data: str | None = None  # HellaSwag .jsonl file; default: download from the Hub
    limit: int = 0  # evaluate the first N examples; 0: all 10,042
    device: str = "auto"  # auto, cuda, mps or cpu
    precision: Precision = "auto"  # autocast dtype; auto: bf16 or fp16 if native, else float32


def main(config: HellaSwagConfig) -> None:
    """Evaluate on all ranks, print the accuracies and write them to log_dir/hellaswag.json."""
    if config.limit < 0:
        raise UserError(f"--limit is {config.limit}: must be 0 (all examples) or more")
    with init_ranks(config.device, rank_timeout=3600) as ranks:
        examples = load_examples(config.data, config.limit)
        source, model, tokenizer = load_model(config, ranks.device, verbose=ranks.is_master)
        path = Path(config.log_dir) / "hellaswag.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(path.parent, os.W_OK):  # said before an evaluation of minutes
            raise UserError(f"log_dir {config.log_dir!r} is not writable: pass another --log_dir")
        precision = select_precision(config.precision, ranks.device)
        if precision == "float32":
            prepare_for_inference(model, torch.float32)
        dtype = DTYPES[precision]
        with torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32):
            result = evaluate_hellaswag(model, tokenizer, examples, ranks, show_bar=True)
        if ranks.is_master and result:
            print(f"{result['examples']} examples | "
                  f"acc {result['acc']:.4f} ± {result['acc_stderr']:.4f} | "
                  f"acc_norm {result['acc_norm']:.4f} ± {result['acc_norm_stderr']:.4f} | "
                  f"{precision} | {path}")
            metadata = {"checkpoint": source, "data": config.data or "Rowan/hellaswag, validation",
                        "precision": precision}
            with atomic_write(path) as file:
                file.write(json.dumps(metadata | result, indent=2).encode() + b"\n")


if __name__ == "__main__":
    cli.run_cli(main, HellaSwagConfig)
