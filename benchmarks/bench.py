"""Measure the speed of training or generation: python -m benchmarks.bench train, or generate

Flags of scripts.train set model and batch, such as --config configs/laptop.yaml.
Weights and tokens are random.
"""

import contextlib
import statistics
import sys
import tempfile
import timeit
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tyro.conf import Positional

from gpt.device import DTYPES, device_name, select_device
from gpt.errors import UserError
from gpt.files import load_pt, read_metrics
from gpt.flops import flops_per_token, peak_flops
from gpt.generation import generate, prepare_for_inference
from gpt.model import GPT
from gpt.shards import read_meta, token_dtype, write_shard
from scripts import cli, train


@dataclass
class BenchConfig(train.TrainConfig):
    """Settings of benchmarks.bench, besides those of scripts.train."""

    mode: Positional[Literal["train", "generate"]] = "train"  # what to measure: train or generate
    num_repeats: int = 10  # steps or generations to time; the median is reported
    batch_sizes: tuple[int, ...] = (1, 16)  # generate: samples per batch
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")  # generate: dtypes
    max_new_tokens: int = 128  # generate: new tokens per sample


def main(config: BenchConfig) -> None:
    """Print a table with a column for each measurement; the last row is its tokens/s."""
    if min(config.num_repeats, config.max_new_tokens, *(config.batch_sizes or [0])) < 1:
        raise UserError(f"--num_repeats is {config.num_repeats}, --max_new_tokens "
                        f"{config.max_new_tokens}, --batch_sizes {config.batch_sizes}: "
                        f"all must be 1 or more")
    device = select_device(config.device)
    vocab_size = config.model.vocab_size or read_meta(config.data_root).get("vocab_size", 50257)
    config = replace(config, model=replace(config.model, vocab_size=vocab_size))
    if config.mode == "train":
        columns = [bench_train(config, device)]
    else:
        columns = list(bench_generate(config, device))
    print(f"{config.mode} on {device_name(device)}, {torch.get_num_threads()} CPU threads")
    for name in columns[0]:
        print(f"{name:<20}" + "".join(f"{column[name]:>14}" for column in columns))


def bench_train(config: BenchConfig, device: torch.device) -> dict[str, float | str]:
    """Run scripts.train on random tokens and return its speed and memory."""
    V, warmup_steps = config.model.vocab_size, 3
    last_step = warmup_steps + config.num_repeats
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        tokens = np.random.default_rng(0).integers(V, size=2**20, dtype=token_dtype(V))
        write_shard(folder, "train", 0, tokens)
        train_config = replace(
            config, data_root=folder, log_dir=folder, init_from="scratch", max_steps=last_step,
            max_tokens=0, max_epochs=0, patience=0, eval_every=0, save_every=0, sample_every=0,
            hellaswag_every=0, tensorboard=False, wandb_project=None)
        if status := train.main(train_config):
            sys.exit(status)  # stopped by a signal
        records = read_metrics(Path(folder) / "metrics.jsonl")
        memory = peak_memory(device)
        checkpoint = load_pt(Path(folder) / f"model_{last_step:05d}.pt")
    rates = [record["tokens_per_s"] for record in records if record["split"] == "train"]
    tokens_per_s = statistics.median(rates[warmup_steps:])
    run = checkpoint["train_config"]  # settings without "auto"
    model = GPT.from_checkpoint(checkpoint)
    B, T, n = run["micro_batch_size"], run["seq_len"], model.num_parameters()
    peak = peak_flops(device, DTYPES[run["precision"]])[0]
    flops = flops_per_token(model.config, n, T)
    return {"parameters": f"{n:,}", "optimizer": run["optimizer"], "precision": run["precision"],
            "batch": f"{run['total_batch_size'] // (B * T)} x {B} x {T}",
            "peak memory (GB)": round(memory / 1e9, 2),
            "peak TFLOP/s": round(peak / 1e12, 3),
            "MFU (%)": round(100 * flops * tokens_per_s / peak, 1),
            "ms/step": round(1e3 * run["total_batch_size"] / tokens_per_s, 1),
            "tokens/s": round(tokens_per_s)}


def bench_generate(config: BenchConfig, device: torch.device) -> Iterator[dict[str, float | str]]:
    """Yield the speed of greedy generation after a prompt of one token,
    for each dtype and batch size.

    Memory bandwidth is the limit: each step reads all weights but the position embeddings once.
    """
    bandwidth = measured_memory_bandwidth(device)
    for dtype in config.dtypes:
        model = GPT(replace(config.model, block_size=config.model.block_size or 1024)).to(device)
        n_weights = model.num_parameters() - model.wpe.weight.numel()
        n_bytes = n_weights * getattr(torch, dtype).itemsize
        prepare_for_inference(model, getattr(torch, dtype))
        for B in config.batch_sizes:
            seconds = []
            for _ in range(config.num_repeats):
                t0 = timeit.default_timer()
                list(generate(model, [[0]] * B, config.max_new_tokens, temperature=0))
                seconds.append(timeit.default_timer() - t0)
            yield {"weights": dtype, "batch size": B,
                   "limit (tokens/s)": round(B * bandwidth / n_bytes, 1),
                   "tokens/s": round(B * config.max_new_tokens / statistics.median(seconds), 1)}


def measured_memory_bandwidth(device: torch.device) -> float:
    """Measure how many bytes per second `device` reads from its memory: the best of five runs."""
    size = 2**28 if device.type == "cuda" else 2**26  # larger than any cache
    a = torch.ones(size, device=device)
    return a.nbytes / min(timeit.repeat(lambda: a.sum().item(), number=1, repeat=5))


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far in bytes: of tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    cli.run_cli(main, BenchConfig)
