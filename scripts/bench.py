"""How fast is it here, and how fast could it be? python -m scripts.bench train (or generate, or load)

All flags of scripts.train choose what is measured, such as --config configs/laptop.yaml.
"""

import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tyro.conf import Positional

from gpt.config import GPTConfig
from gpt.dataloader import DataLoaderLite
from gpt.device import DTYPES, select_device, select_precision
from gpt.errors import UserError
from gpt.files import read_metrics
from gpt.flops import flops_per_token, peak_flops
from gpt.generation import generate, prepare_for_generation
from gpt.model import GPT
from gpt.shards import read_meta, token_dtype, write_shard
from scripts import cli, train


@dataclass
class BenchConfig(train.TrainConfig):
    """Settings of scripts.bench, besides those of scripts.train."""

    what: Positional[Literal["train", "generate", "load"]] = "train"  # what to measure: train, generate or load
    repeats: int = 10  # number of measurements; the median is reported
    batch_sizes: list[int] = field(default_factory=lambda: [1, 16])  # generate: samples per batch
    dtypes: list[Literal["float32", "bfloat16"]] = field(default_factory=lambda: ["float32", "bfloat16"])
    """generate: dtypes of the weights"""
    new_tokens: int = 128  # generate: new tokens per sample
    shards: int = 3  # load: number of shards of 100M tokens
    json: bool = False  # print one JSON object instead of a table


def main(config: BenchConfig) -> None:
    """Measure, and print a table: of random tokens and random weights, which take the same time as others."""
    if config.repeats < 1 or config.new_tokens < 2 or config.shards < 1 or not all(b > 0 for b in config.batch_sizes):
        raise UserError("repeats, shards and batch_sizes must be 1 or more, new_tokens 2 or more")
    if config.seq_len == "auto":
        raise UserError("seq_len is auto: bench makes tokens of its own, pass a number")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("bench measures one process: run it without torchrun")
    device = select_device(config.device)
    vocab_size = config.model.vocab_size or read_meta(config.data_root).get("vocab_size", 50257)
    with tempfile.TemporaryDirectory() as folder:
        rows = {"train": bench_train, "generate": bench_generate, "load": bench_load}[config.what](
            config, vocab_size, device, Path(folder))
    peak_mb = round(peak_memory(device) / 1e6)
    if config.json:
        print(json.dumps({"what": config.what, "device": device_name(device), "torch": torch.__version__,
                          "threads": torch.get_num_threads(), "peak_memory_mb": peak_mb, "rows": rows}))
        return
    print(f"{config.what} on {device_name(device)}, torch {torch.__version__}, peak memory {peak_mb:,} MB")
    for key in rows[0]:
        cells = (f"{value:,.0f}" if isinstance(value := row[key], float) and value >= 1000 else
                 f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int)
                 else value for row in rows)
        print(f"{key.replace('_', ' '):<22}" + "".join(f"{cell:>14}" for cell in cells))


def bench_train(config: BenchConfig, vocab_size: int, device: torch.device, folder: Path) -> list[dict]:
    """Return a row for the real training loop on random tokens, without what happens between steps."""
    precision = select_precision(config.precision, device)
    peak, source = peak_flops(device, DTYPES[precision])
    tokens = np.random.default_rng(0).integers(vocab_size, size=config.total_batch_size * 2 + 1)
    write_shard(folder, "train", 0, tokens.astype(token_dtype(vocab_size)))
    warmup, seq_len = 3, int(config.seq_len)
    run = {each.name: getattr(config, each.name) for each in fields(train.TrainConfig)} | dict(
        model=replace(config.model, vocab_size=vocab_size), data_root=str(folder), log_dir=str(folder / "log"),
        max_steps=warmup + config.repeats, max_tokens=0, max_epochs=0, patience=0, overfit_one_batch=False,
        init_from="scratch", eval_every=0, save_every=0, sample_every=0, hellaswag_every=0, tensorboard=False,
        wandb_project=None)
    with contextlib.redirect_stdout(sys.stderr):
        if status := train.main(train.TrainConfig(**run)):  # a signal
            sys.exit(status)
    rates = [record["tokens_per_s"] for record in read_metrics(folder / "log" / "metrics.jsonl")][warmup:]
    model = torch.load(next((folder / "log").glob("model_*.pt")), mmap=True)  # not counted as this process's memory
    n = sum(tensor.numel() for tensor in model["model"].values())
    flops = flops_per_token(GPTConfig(**model["config"]), n, seq_len)
    peak = max(peak, peak_flops(device, DTYPES[precision])[0])  # of before and after: others may use this machine
    tokens_per_s = statistics.median(rates)
    return [{"parameters": n, "precision": precision, "optimizer": config.optimizer,
             "batch": f"{config.total_batch_size // config.micro_batch_size // seq_len} x "
                      f"{config.micro_batch_size} x {config.seq_len}", "vocab_size": vocab_size,
             "ms_per_step": 1e3 * config.total_batch_size / tokens_per_s, "tokens_per_s": tokens_per_s,
             "mfu": flops * tokens_per_s / peak, "gflop_per_token": flops / 1e9, "peak_tflop_per_s": peak / 1e12,
             "peak_source": source}]


def bench_generate(config: BenchConfig, vocab_size: int, device: torch.device, folder: Path) -> list[dict]:
    """Return the speed of greedy decoding from a one-token prompt, for a model prepared as in scripts.generate.

    The limit is memory bandwidth: every step reads all weights once.
    """
    shape = GPTConfig(**asdict(config.model) | {"vocab_size": vocab_size, "dropout": 0.0,
                                                "block_size": config.model.block_size or 1024})
    rows, read_rate = [], memory_rate(device)
    for dtype in config.dtypes:
        torch.manual_seed(config.seed)
        model = GPT(shape).to(device)
        n_parameters, n_positions = model.num_parameters(), model.wpe.weight.numel()  # packing hides the weights
        prepare_for_generation(model, getattr(torch, dtype))
        weight_bytes = (n_parameters - n_positions) * model.wte.weight.element_size()
        for B in config.batch_sizes:
            seconds = []
            for _ in range(config.repeats):
                began, times = time.perf_counter(), []
                for _ in generate(model, [[0]] * B, config.new_tokens, temperature=0):
                    times.append(time.perf_counter() - began)
                seconds.append((times[-1] - times[0]) / (len(times) - 1))
            median = statistics.median(seconds)
            rows.append({"weights": dtype, "batch_size": B, "parameters": n_parameters,
                         "ms_per_step": 1e3 * median, "tokens_per_s": B / median,
                         "limit_tokens_per_s": B * read_rate / weight_bytes, "memory_gb_per_s": read_rate / 1e9})
    return rows


def bench_load(config: BenchConfig, vocab_size: int, device: torch.device, folder: Path) -> list[dict]:
    """Random batches from shards of 100 million tokens."""
    tokens = np.random.default_rng(0).integers(vocab_size, size=100_000_000, dtype=token_dtype(vocab_size))
    for i in range(config.shards):
        write_shard(folder, "train", i, tokens)
    del tokens
    before, starts, seconds = resident(), [], []
    for _ in range(config.repeats):
        began = time.perf_counter()
        loader = DataLoaderLite(folder, "train", micro_batch_size=config.micro_batch_size, seq_len=int(config.seq_len),
                                vocab_size=vocab_size, total_batch_size=config.total_batch_size, device=device)
        starts.append(time.perf_counter() - began)
    for step in range(100 * config.repeats):
        began = time.perf_counter()
        loader.batch(step, 0)
        seconds.append(time.perf_counter() - began)
    return [{"shards": config.shards, "tokens": config.shards * 100_000_000,
             "start_ms": 1e3 * statistics.median(starts), "batch": f"{config.micro_batch_size} x {config.seq_len}",
             "ms_per_batch": 1e3 * statistics.median(seconds), "own_memory_mb": (resident() - before) / 1e6}]


def memory_rate(device: torch.device) -> float:
    """Bytes per second at which `device` reads its memory, as measured here and now: the best of five."""
    a = torch.ones(2**28 if device.type == "cuda" else 2**26, device=device)  # far more than a cache holds
    times = []
    for _ in range(5):
        began = time.perf_counter()
        a.sum().item()
        times.append(time.perf_counter() - began)
    return a.nbytes / min(times)


def resident() -> int:
    """Bytes of this process's own memory, without the shards' pages, which the system may take back. 0: unknown."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def peak_memory(device: torch.device) -> int:
    """The most memory in use so far, in bytes: of the GPU's for tensors, or of the process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_name(device: torch.device) -> str:
    """What the device is called."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} with {torch.get_num_threads()} threads"


if __name__ == "__main__":
    cli.run_cli(main, BenchConfig)
