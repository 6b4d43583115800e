"""Turn text into token shards: python -m scripts.prepare --input my_texts --out my_data"""

import hashlib
import os
import shlex
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from gpt.errors import UserError
from gpt.shards import (
    ShardWriter,
    dataset_folder,
    find_shards,
    format_token_counts,
    read_tokens,
    stat_shard,
    token_dtype,
)
from gpt.text_files import Chunk, Source, TextConfig, find_sources, read_batches
from gpt.tokenizer import END_OF_TEXT, Tokenizer
from scripts import cli

SPLITS = ("train", "val")


@dataclass
class PrepareConfig(TextConfig):
    """Settings of scripts.prepare."""

    val_input: list[str] = field(default_factory=list)  # validation files; --input is for training
    val_split: str | None = None  # validation split of --dataset; default: use --val_fraction
    tokenizer: str = "gpt2"  # gpt2, or a folder written by scripts.train_tokenizer
    out: str = "data"  # output folder
    shard_size: int = 100_000_000  # maximum tokens per shard
    num_workers: int = 0  # encoding threads; 0: one per CPU core

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.out:
            raise UserError("--out is empty: pass a folder for the shards")
        if self.val_input and self.val_split:
            raise UserError("--val_input and --val_split are mutually exclusive: pass one of them")
        if self.val_split and (not self.dataset or self.val_split == self.split):
            raise UserError(f"--val_split {self.val_split} needs a --dataset and must differ from "
                            f"--split {self.split}: with --input, pass --val_input FILE")
        if self.num_workers < 0 or not 1 <= self.shard_size <= 2**32:
            raise UserError(f"--num_workers is {self.num_workers} and --shard_size is "
                            f"{self.shard_size}: expected 0 or more workers and "
                            f"1 to {2**32:,} tokens")


def main(config: PrepareConfig) -> None:
    """Encode text into shards and write meta.json; after an interruption, go on with the documents
    that are not in the shards yet."""
    tokenizer = Tokenizer.load(config.tokenizer)
    sources = find_all_sources(config)
    versions = [(source.path, source.version) for source in sources]
    inputs = hashlib.sha256(repr(versions).encode()).hexdigest()
    settings = asdict(config) | {"tokenizer": tokenizer.name, "inputs": inputs}
    for name in ("out", "num_workers"):  # these do not affect the shards
        del settings[name]
    t0 = time.perf_counter()
    text_source = config.dataset or ", ".join(config.input)
    with dataset_folder(config.out, tokenizer, settings, text_source) as meta:
        is_new = not meta["complete"]
        if is_new:
            kind = "splits" if config.dataset else "files"
            print(f"reading {text_source}: {len(sources)} {kind}")
            write_shards(config, tokenizer, sources, meta)
    if is_new:
        seconds = time.perf_counter() - t0
        print(f"Saved {format_token_counts(meta)} in {config.out} ({seconds:.1f} s)")
    else:
        print(f"{config.out} is complete ({format_token_counts(meta)}): nothing to do")
    split = sorted(meta["splits"])[-1]
    shard = stat_shard(find_shards(config.out, split)[0])
    tokens = read_tokens(shard, 0, min(shard.length, 50), tokenizer.n_vocab)
    text = tokenizer.decode(tokens[1:].tolist(), errors="ignore").strip()
    first_line, *_ = text.replace(END_OF_TEXT, "\n").split("\n")
    print(f"the {split} text begins: {first_line}")
    small = "" if tokenizer.name == "gpt2" else "--config configs/laptop.yaml "
    print(f"train on it: python -m scripts.train {small}--data_root {shlex.quote(config.out)}")


def find_all_sources(config: PrepareConfig) -> list[Source]:
    """Return all sources, validation first.

    Files in --val_input are excluded from training.
    """
    sources, val_sources = find_sources(config), []
    if config.val_input:
        val_text = replace(config, input=config.val_input, val_input=[], dataset=None)
        val_sources = find_sources(val_text, "val")
    elif config.val_split:
        val_sources = find_sources(replace(config, split=config.val_split, val_split=None), "val")
    if val_sources:
        for source in sources:
            source.split = "train"
    excluded = {os.path.realpath(source.path) for source in val_sources if not source.hub_split}
    train_sources = [source for source in sources
                     if os.path.realpath(source.path) not in excluded]
    if not train_sources:
        raise UserError("no text for training (all files of --input are in --val_input): pass "
                        "other files")
    return val_sources + train_sources


def write_shards(config: PrepareConfig, tokenizer: Tokenizer, sources: list[Source],
                 meta: dict) -> None:
    """Encode and write all documents that are not in the shards yet.

    Raises UserError if a requested split is empty.
    """
    dtype = token_dtype(tokenizer.n_vocab)
    # One tokenizer per thread: 1.4 times as fast as two threads sharing one.
    local = threading.local()

    def start_thread() -> None:
        local.tokenizer = Tokenizer(tokenizer.merge_table)

    def encode(batch: list[Chunk]) -> dict[str, np.ndarray]:
        tokens = {}
        for split in SPLITS:
            chunks = [chunk[1:] for chunk in batch if chunk[0] == split]
            tokens[split] = local.tokenizer.encode_documents(chunks).astype(dtype)
        return tokens

    writers = {split: ShardWriter(config.out, split, meta, config.shard_size) for split in SPLITS}
    n_saved = {split: writers[split].saved["documents"] for split in SPLITS}
    n_read = dict.fromkeys(SPLITS, 0)

    def new_documents() -> Iterator[list[Chunk]]:
        for batch in read_batches(sources, config):
            chunks = []
            for split, begins, text in batch:
                n_read[split] += begins
                if n_read[split] > n_saved[split]:
                    chunks.append((split, begins, text))
            yield chunks

    if hasattr(os, "sched_getaffinity"):
        n_cores = len(os.sched_getaffinity(0))
    else:
        n_cores = os.cpu_count() or 1
    n_workers = config.num_workers or n_cores
    max_pending = 2 * n_workers + 32  # enough to keep the workers busy while a shard is saved
    if any(n_saved.values()):
        print(f"resuming after {format_token_counts(meta)}")
    with ThreadPoolExecutor(n_workers, initializer=start_thread) as pool:
        for tokens in ordered_map(pool, encode, new_documents(), max_pending):
            for split, writer in writers.items():
                writer.write(tokens[split])
    splits = SPLITS if config.val_fraction or config.val_input or config.val_split else ["train"]
    for split in splits:
        if not n_read[split]:
            raise UserError(f"there is no text for {split}: pass more text, or another "
                            f"--val_fraction (now {config.val_fraction}; 0: no validation data) or "
                            f"--val_input")
    for writer in writers.values():
        writer.close()


def ordered_map(pool: ThreadPoolExecutor, function: Callable, items: Iterable,
                ahead: int) -> Iterator:
    """Yield `function(item)` in order; the pool computes up to `ahead` items in advance."""
    futures: deque[Future] = deque()
    for item in items:
        futures.append(pool.submit(function, item))
        if len(futures) > ahead:
            yield futures.popleft().result()
    while futures:
        yield futures.popleft().result()


if __name__ == "__main__":
    cli.run_cli(main, PrepareConfig)
