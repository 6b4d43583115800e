"""Turn text into token shards: python -m scripts.prepare --input my_texts --out my_data"""

import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gpt.errors import UserError
from gpt.shards import (
    ShardWriter,
    count_tokens,
    dataset_folder,
    find_shards,
    format_token_counts,
    open_shard,
    read_meta,
    read_tokenizer,
    split_stats,
    token_dtype,
)
from gpt.text_files import Chunk, Source, TextConfig, find_sources, read_batches
from gpt.tokenizer import Tokenizer
from scripts import cli

SPLITS = ("train", "val")


@dataclass
class PrepareConfig(TextConfig):
    """Settings of scripts.prepare."""

    val_input: list[str] = field(default_factory=list)  # validation files; --input is for training
    val_split: str | None = None  # validation split of --dataset; unset: use --val_fraction
    tokenizer: str = "gpt2"  # gpt2, or a folder written by scripts.train_tokenizer
    out: str = "data"  # output folder
    shard_size: int = 100_000_000  # maximum tokens per shard
    num_workers: int = 0  # encoding threads; 0: one per CPU core
    check: str | None = None  # dataset folder to verify, every token of it; nothing is written


def main(config: PrepareConfig) -> None:
    """Encode text into shards and write meta.json;
    after an interruption, resume from the existing shards."""
    if config.check is not None:
        return check_dataset(Path(config.check))
    check_config(config)
    tokenizer = Tokenizer.load(config.tokenizer)
    sources = find_all_sources(config)
    versions = [(source.path, source.version) for source in sources]
    inputs = hashlib.sha256(repr(versions).encode()).hexdigest()
    settings = asdict(config) | {"tokenizer": tokenizer.name, "inputs": inputs}
    for name in ("out", "num_workers", "check"):  # these do not affect the shards
        del settings[name]
    t0 = time.perf_counter()
    text_source = config.dataset or ", ".join(config.input)
    with dataset_folder(config.out, tokenizer, settings, text_source) as meta:
        if "splits" in meta:
            print(f"{config.out} is complete ({format_token_counts(meta)}): nothing to do")
            return
        writers = {split: ShardWriter(config.out, split, tokenizer, config.shard_size)
                   for split in SPLITS}
        if n_before := count_all(writers):
            print(f"resuming in {config.out} after {n_before:,} tokens")
        write_shards(config, tokenizer, sources, writers)
        meta["splits"] = {split: writer.close() for split, writer in writers.items()
                          if writer.counts.any()}
    seconds = time.perf_counter() - t0
    print(f"Saved {format_token_counts(meta)} in {seconds:.1f} s "
          f"({(count_all(writers) - n_before) / seconds / 1e6:.2f}M tokens/s)")


def count_all(writers: dict[str, ShardWriter]) -> int:
    """Return the number of tokens in all splits."""
    return sum(int(writer.counts.sum()) for writer in writers.values())


def check_config(config: PrepareConfig) -> None:
    """Raise UserError for impossible settings."""
    if not config.out:
        raise UserError("--out is empty: pass a folder for the shards")
    if config.val_input and config.val_split:
        raise UserError("--val_input and --val_split are mutually exclusive: pass one of them")
    if config.val_split and (not config.dataset or config.val_split == config.split):
        raise UserError(f"--val_split {config.val_split} needs a --dataset and must differ from "
                        f"--split {config.split}: with --input, pass --val_input FILE")
    if config.num_workers < 0 or not 1 <= config.shard_size <= 2**32:
        raise UserError(f"--num_workers is {config.num_workers} and --shard_size is "
                        f"{config.shard_size}: expected 0 or more workers and "
                        f"1 to {2**32:,} tokens")


def find_all_sources(config: PrepareConfig) -> list[Source]:
    """Return all sources, validation first.

    Files in --val_input or --out are excluded from training.
    """
    sources, val_sources = find_sources(config), []
    if config.val_input or config.val_split:
        text = TextConfig(**{each.name: getattr(config, each.name) for each in fields(TextConfig)})
        if config.val_input:
            val_text = replace(text, input=config.val_input, dataset=None)
        else:
            val_text = replace(text, split=config.val_split or "")
        val_sources = find_sources(val_text, "val")
        for source in sources:
            source.split = "train"
    val_paths = {os.path.realpath(source.path) for source in val_sources}
    out = os.path.realpath(config.out) + os.sep
    train_sources = []
    for source in sources:
        path = os.path.realpath(source.path)
        if source.tables is not None or not (path in val_paths or path.startswith(out)):
            train_sources.append(source)
    if not train_sources:
        raise UserError("no text for training (all files of --input are in --val_input or --out): "
                        "pass other files")
    return val_sources + train_sources


def write_shards(config: PrepareConfig, tokenizer: Tokenizer, sources: list[Source],
                 writers: dict[str, ShardWriter]) -> None:
    """Encode and write all documents that are not in the shards yet.

    Raises UserError if a requested split is empty.
    """
    dtype = token_dtype(tokenizer.n_vocab)
    # One tokenizer per thread: 1.4 times as fast as two threads sharing one.
    local = threading.local()

    def start_thread() -> None:
        local.tokenizer = Tokenizer(tokenizer.merge_table)

    def encode(item: tuple[list[Chunk], float]) -> tuple[dict[str, np.ndarray], float]:
        batch, fraction = item
        tokens = {}
        for split in SPLITS:
            chunks = [chunk[1:] for chunk in batch if chunk[0] == split]
            tokens[split] = local.tokenizer.encode_documents(chunks).astype(dtype)
        return tokens, fraction

    if hasattr(os, "sched_getaffinity"):
        n_cores = len(os.sched_getaffinity(0))
    else:
        n_cores = os.cpu_count() or 1
    n_workers = config.num_workers or n_cores
    max_pending = 2 * n_workers + 32  # enough to keep the workers busy while a shard is saved
    pool = ThreadPoolExecutor(n_workers, initializer=start_thread)
    n_begun = {split: writers[split].n_documents for split in SPLITS}
    batches = skip_documents(read_batches(sources, config), n_begun)
    bar = tqdm(unit=" tokens", unit_scale=True, disable=None, initial=count_all(writers))
    with pool, bar:
        for tokens, fraction in ordered_map(pool, encode, batches, max_pending):
            for split, writer in writers.items():
                writer.write(tokens[split])
            n_tokens = count_all(writers)
            # Estimated from the bytes read.
            bar.total = round(n_tokens / fraction) if fraction else None
            bar.update(n_tokens - bar.n)
    n_train, n_val = (writers[split].n_documents for split in SPLITS)
    if not n_train + n_val:
        raise UserError("the input has no text: every document is empty")
    if not n_train:
        raise UserError(f"all of the text is in the val split: lower --val_fraction "
                        f"(now {config.val_fraction}), or pass --val_input FILE")
    if not n_val and (config.val_input or config.val_split):
        raise UserError("the validation text is empty: pass another --val_input or --val_split")
    if not n_val and config.val_fraction:
        raise UserError(f"all of the text is in the train split: raise --val_fraction "
                        f"(now {config.val_fraction}), or pass --val_input FILE or, "
                        f"for no validation data, --val_fraction 0")


def skip_documents(batches: Iterable[tuple[list[Chunk], float]], n_begun: dict[str, int]
                   ) -> Iterator[tuple[list[Chunk], float]]:
    """Drop the first `n_begun - 1` documents of each split: they are complete;
    the next may have been cut short."""
    seen = dict.fromkeys(n_begun, 0)
    for batch, fraction in batches:
        kept = []
        for split, begins, text in batch:
            seen[split] += begins
            if seen[split] >= n_begun[split]:
                kept.append((split, begins, text))
        yield kept, fraction


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


def check_dataset(data_root: Path) -> None:
    """Verify every token of a dataset and print its statistics.

    Raises UserError if meta.json differs.
    """
    if not data_root.is_dir():
        raise UserError(f"--check {str(data_root)!r}: no such folder")
    meta = read_meta(data_root)
    tokenizer, n_vocab = read_tokenizer(data_root, meta), meta.get("vocab_size", 50257)
    for split in meta.get("splits", SPLITS):
        paths = find_shards(data_root, split)
        counts = np.zeros(n_vocab, dtype=np.int64)
        for path in tqdm(paths, f"checking {split}", unit=" shards", disable=None):
            counts += count_tokens(path, n_vocab)
        stats = split_stats(counts, tokenizer) if tokenizer else {"tokens": int(counts.sum())}
        for name, expected in meta.get("splits", {}).get(split, {}).items():
            if stats.get(name, expected) != expected:
                raise UserError(f"{data_root} has {stats[name]:,} {split} {name}, but meta.json "
                                f"says {expected:,}: prepare the data again")
        numbers = ", ".join(f"{value:,} {name}" for name, value in stats.items())
        print(f"{split}: {len(paths)} shards, {numbers}")
        if tokenizer:
            text = tokenizer.decode(open_shard(paths[0])[:100].tolist())
            print("".join(f"    {line[:110]}\n" for line in text.splitlines()[:4]), end="")
    print("all tokens are in the vocabulary" + (", and meta.json is correct" if meta else ""))


if __name__ == "__main__":
    cli.run_cli(main, PrepareConfig)
