"""Turn text into token shards: python -m scripts.prepare --input my_texts --out my_data"""

import hashlib
import itertools
import json
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gpt.documents import Batch, Piece, Source, TextConfig, find_sources, read_batches, share_out
from gpt.errors import UserError
from gpt.files import atomic_write, read_json, run_lock
from gpt.shards import (
    ShardWriter,
    count,
    find_shards,
    is_complete,
    longest_seq_len,
    open_shard,
    read_finished,
    read_meta,
    token_dtype,
    write_meta,
    write_tokenizer,
)
from gpt.tokenizer import END_OF_TEXT, get_tokenizer, new_tokenizer, read_table, token_lengths, tokenizer_name
from scripts import cli


@dataclass
class PrepareConfig(TextConfig):
    """Settings of scripts.prepare."""

    val_input: list[str] = field(default_factory=list)  # validation files; --input is then training data only
    val_split: str | None = None  # split of the dataset to validate on
    val_tokens: int = 0  # validate on the first N tokens; 0: see val_fraction
    tokenizer: str = "gpt2"  # gpt2, or a folder written by scripts.train_tokenizer
    allow_special: bool = False  # encode <|endoftext|> in the text as the special token
    out: str = "data"  # output folder
    shard_size: int = 100_000_000  # tokens per shard
    num_workers: int = 0  # encoding threads; 0: one per CPU core
    part: int = 0  # index of this job, from 0
    parts: int = 1  # number of jobs that split the work
    merge: bool = False  # merge the finished parts into one dataset
    check: str | None = None  # verify every token in this dataset folder, and exit


# What has no influence on the files, or only on whether they come to be.
NOT_COMPARED = ("out", "num_workers", "part", "merge", "check", "errors")

CHECKED_AT_ONCE = 2**24  # tokens


def main(config: PrepareConfig) -> None:
    """Write the shards of the input, or of a part of it, and meta.json; go on where an interrupted run stopped."""
    check(config)
    if config.check is not None:
        return check_data(Path(config.check))
    out = Path(config.out)
    if config.merge:
        if not out.is_dir():
            raise UserError(f"out {config.out!r} is not a folder: pass the one that the parts were written to")
        with run_lock(out, "out", "_merge"):
            print(f"{out} is complete: {count(merge(out))}")
        return
    table = config.tokenizer if config.tokenizer == "gpt2" else read_table(config.tokenizer)
    sources, val_sources = find_sources(config), []
    if config.val_input or config.val_split:
        text = {each.name: getattr(config, each.name) for each in fields(TextConfig)}
        wanted = {"input": config.val_input, "dataset": None} if config.val_input else {"split": config.val_split}
        val_sources = find_sources(TextConfig(**{**text, **wanted}), "val")
    out_path, val_paths = os.path.realpath(out) + os.sep, {os.path.realpath(source.path) for source in val_sources}
    sources = [source for source in sources if not os.path.realpath(source.path).startswith(out_path)
               and os.path.realpath(source.path) not in val_paths]
    if not sources:
        raise UserError("there is no input for training: all files of --input are those of --val_input, or in --out")
    if config.val_tokens or val_sources or not config.val_fraction:
        for source in sources:
            source.split = "train"
    files = [(source.path, source.size) for source in sources + val_sources]
    settings = {key: value for key, value in asdict(config).items() if key not in NOT_COMPARED} | {
        "tokenizer": tokenizer_name(table), "files": len(files), "bytes_on_disk": sum(size for _, size in files),
        "names_and_sizes": hashlib.sha256(repr(files).encode()).hexdigest()}
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out {config.out!r} cannot be made ({error.strerror}): pass another --out") from None
    try:
        with run_lock(out, "out", f"_{config.part:05d}"):
            if meta := read_finished(out):
                refuse_other(out, settings, meta.get("settings"))
                print(f"{out} is complete ({count(merge(out))}): nothing to do")
                return
            prepare_part(config, table, settings, out, [
                *share_out(val_sources, config.part, config.parts), *share_out(sources, config.part, config.parts)])
            if config.parts == 1:
                merge(out)
    finally:
        if made and not any(out.iterdir()):
            out.rmdir()


def check(config: PrepareConfig) -> None:
    """Raise UserError for a value that cannot be meant."""
    if not config.out:
        raise UserError("out is empty: pass a folder for the shards")
    if bool(config.val_input) + bool(config.val_split) + bool(config.val_tokens) > 1:
        raise UserError("val_input, val_split and val_tokens exclude one another: pass one of them")
    if config.val_split and not config.dataset:
        raise UserError(f"val_split {config.val_split!r} is of a data set of the hub: pass --dataset, or --val_input")
    for name, low in (("val_tokens", 0), ("num_workers", 0), ("shard_size", 1), ("parts", 1), ("part", 0)):
        if not low <= getattr(config, name) < 2**63:
            raise UserError(f"{name} is {getattr(config, name)}: it must be {low} or more")
    if config.part >= config.parts:
        raise UserError(f"part is {config.part} of {config.parts} parts: they count from 0 to {config.parts - 1}")


def prepare_part(config: PrepareConfig, table: str, settings: dict, out: Path, sources: list[Source]) -> None:
    """Write this part's shards; a record beside them says how far they have come."""
    record = out / f"prepare_{config.part:05d}_of_{config.parts:05d}.json"
    stamps = [os.stat(source.path).st_mtime_ns for source in sources if "://" not in source.path]
    state = begin_record(record, settings, table, hashlib.sha256(repr(stamps).encode()).hexdigest())
    if state["finished"]:
        print(f"part {config.part} of {config.parts} in {out} is complete: nothing to do")
        return
    encoding, counts = get_tokenizer(table), state["splits"]
    dtype, bytes_of = token_dtype(encoding.n_vocab), token_lengths(encoding)
    writers = {split: ShardWriter(out, split, dtype, config.shard_size, first=config.part, every=config.parts,
                                  shards=about["shards"], unfinished=about["unfinished"])
               for split, about in counts.items()}
    for writer in writers.values():
        for path in map(writer.path, range(writer.shards)):
            if not path.exists():
                raise UserError(f"{path} is gone: delete {str(out)!r} and prepare the data again")
    began, before = time.perf_counter(), total_of(counts)
    if state["position"]:
        print(f"going on with part {config.part} of {config.parts} in {out}, after {before['tokens']:,} tokens")
    batches = read_batches(sources, config, config.part, config.parts, state["position"])
    bar = tqdm(total=1.0, disable=None, bar_format="{percentage:5.1f}%|{bar}| {elapsed}<{remaining}{postfix}")
    useful = state["position"] is not None  # there are shards, and a record that says where to go on
    try:
        save_record(record, state, writers)  # from now on the folder is known to be unfinished
        with bar:
            for tokens, batch in in_order(encoder(table, config.allow_special), batches, workers_of(config)):
                if config.part == 0 and (missing := config.val_tokens - counts["val"]["tokens"]) > 0:
                    tokens = {"val": tokens["train"][:missing], "train": tokens["train"][missing:]}
                complete = sum(writer.shards for writer in writers.values())
                for split, found in tokens.items():
                    writers[split].write(found)
                    counts[split]["tokens"] += len(found)
                    counts[split]["documents"] += int((found == encoding.eot_token).sum())
                    counts[split]["bytes"] += int(bytes_of[found].sum())
                if sum(writer.shards for writer in writers.values()) > complete:
                    state["position"] = batch.position
                    save_record(record, state, writers)
                    useful = True
                bar.set_postfix_str(f"{total_of(counts)['tokens']:,} tokens, {speed(counts, before, began)}",
                                    refresh=False)
                bar.update(batch.share - bar.n)
        if config.parts == 1:
            kept, useful = useful, False  # of a text that will not do nothing stays, whatever was written
            require_tokens(counts, settings)
            useful = kept
        for writer in writers.values():
            writer.close()
        state["finished"] = useful = True
        save_record(record, state, writers)
    finally:
        for writer in writers.values():
            writer.abandon(delete=not useful)
        if not useful:
            record.unlink(missing_ok=True)
    print(f"Saved {count(state)}, {total_of(counts)['documents']:,} documents, in {time.perf_counter() - began:.1f} s "
          f"({speed(counts, before, began)})")


def begin_record(record: Path, settings: dict, table: str, stamps: str) -> dict:
    """Where a part's preparation stands; a new one is at the beginning.

    Raises UserError if the folder holds something else, or the input files were changed since.
    """
    for other in record.parent.glob("prepare_*_of_*.json"):
        refuse_other(record.parent, settings, load_record(other)["settings"])
    if record.exists():
        state = load_record(record)
        if state["stamps"] != stamps and not state["finished"]:
            raise UserError(f"the input files have changed since {record} was written: delete {str(record.parent)!r}, "
                            f"and prepare the data again")
        return state
    if any(record.parent.glob("*.npy")) and not any(record.parent.glob("prepare_*_of_*.json")):
        raise UserError(f"out {str(record.parent)!r} holds other shards: pass another --out, or delete it first")
    splits = {split: {"tokens": 0, "documents": 0, "bytes": 0, "shards": 0, "unfinished": 0}
              for split in ("train", "val")}
    return {"settings": settings, "table": table, "stamps": stamps, "position": None, "finished": False,
            "splits": splits}


def load_record(path: Path) -> dict:
    """The record of a part. Raises UserError if it is damaged."""
    state = read_json(path, "the record of a part: delete it and prepare that part again")
    if not {"settings", "table", "stamps", "position", "finished", "splits"} <= state.keys():
        raise UserError(f"{path} is not the record of a part: delete it and prepare that part again")
    return state


def save_record(record: Path, state: dict, writers: dict[str, ShardWriter]) -> None:
    """Force to disk what the writers have, and note where they and the input stand."""
    for split, writer in writers.items():
        writer.sync()
        state["splits"][split] |= {"shards": writer.shards, "unfinished": writer.unfinished}
    with atomic_write(record) as file:
        file.write(json.dumps(state).encode())


def total_of(counts: dict[str, dict]) -> dict[str, int]:
    """Tokens, documents and bytes of all splits."""
    return {key: sum(about[key] for about in counts.values()) for key in ("tokens", "documents", "bytes")}


def speed(counts: dict[str, dict], before: dict[str, int], began: float) -> str:
    """How fast text has been encoded since `began`, in words."""
    tokens, size = ((total_of(counts)[key] - before[key]) / (time.perf_counter() - began) / 1e6
                    for key in ("tokens", "bytes"))
    return f"{tokens:.2f}M tokens/s, {size:.1f} MB/s"


def workers_of(config: PrepareConfig) -> int:
    """Threads to encode with: those asked for, or as many as there are processor cores for this process."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return config.num_workers or len(cores)


def encoder(table: str, allow_special: bool) -> Callable[[Batch], tuple[dict[str, np.ndarray], Batch]]:
    """What turns a batch into the tokens of each split, for several threads to call.

    Each has an encoding of its own: over the scratch space of one they would wait for one another.
    """
    local = threading.local()

    def encode_batch(batch: Batch) -> tuple[dict[str, np.ndarray], Batch]:
        if not hasattr(local, "encoding"):
            local.encoding = new_tokenizer(table)
        dtype = token_dtype(local.encoding.n_vocab)
        return {split: encode(local.encoding, pieces, allow_special).astype(dtype)
                for split, pieces in batch.pieces.items()}, batch

    return encode_batch


def encode(encoding: Any, pieces: list[Piece], allow_special: bool) -> np.ndarray:
    """The tokens (1-D) of pieces of text, with `<|endoftext|>` before each document.

    All go to the tokenizer as one string: a call for each, and the lists it makes, cost as much as the encoding.
    """
    text = "".join(END_OF_TEXT + text if starts else text for starts, text in pieces)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a UTF-16 pair, as JSON may have it: U+FFFD, as in tiktoken
        return encode(encoding, [(starts, part.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
                                 for starts, part in pieces], allow_special)
    if allow_special or text.count(END_OF_TEXT) == sum(starts for starts, _ in pieces):
        return encode_any(encoding, text, {END_OF_TEXT})
    found = [np.zeros(0, dtype=np.uint32)]  # here the text itself has it
    for starts, part in pieces:
        found += [np.array([encoding.eot_token] * starts, dtype=np.uint32), encode_any(encoding, part, set())]
    return np.concatenate(found)


def encode_any(encoding: Any, text: str, special: set[str]) -> np.ndarray:
    """The tokens (1-D) of a text, which is cut where it has more white space in a row than tiktoken can take."""
    try:
        return encoding.encode_to_numpy(text, allowed_special=special, disallowed_special=())
    except ValueError:
        cuts = [0, *(match.end() for match in re.finditer(r"\s{100000}", text)), len(text)]
        if len(cuts) == 2:
            raise
        return np.concatenate([encode_any(encoding, text[begin:end], special)
                               for begin, end in itertools.pairwise(cuts)])


def in_order(function: Callable, items: Iterable, workers: int) -> Iterator:
    """`function` of every item, in order, by `workers` threads that are never more than a few items ahead."""
    if workers == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def require_tokens(counts: dict[str, dict], settings: dict) -> None:
    """Raise UserError where there is no text at all, or none for a split that was asked for."""
    train, val = counts["train"]["documents"], counts["val"]["documents"]
    if not counts["train"]["tokens"] + counts["val"]["tokens"]:
        raise UserError("there is no text in the input: every document is empty")
    if not counts["train"]["tokens"]:
        raise UserError(f"all of the text, {val} documents, is in the val split: lower --val_tokens or --val_fraction")
    if not counts["val"]["tokens"] and any(map(settings.get, ("val_fraction", "val_input", "val_split"))):
        raise UserError(f"none of the {train} documents is in the val split: raise --val_fraction (now "
                        f"{settings['val_fraction']}), or pass --val_tokens, --val_input or, where one file holds many "
                        f"documents, --document_separator")


def merge(out: Path) -> dict:
    """Check that all parts are there, and write the meta.json that makes them one data set, unless it is there."""
    records = sorted(out.glob("prepare_*_of_*.json"))
    if meta := read_finished(out):
        if not is_complete(out, meta):
            raise UserError(f"out {str(out)!r} has damaged or missing shards: delete it and prepare the data again")
        for record in records:  # of a process that was killed just before it had ended
            record.unlink(missing_ok=True)
        return meta
    states = [load_record(record) for record in records]
    if not states:
        raise UserError(f"out {str(out)!r} holds no parts: prepare them with --part 0 --parts N and so on")
    settings, table = states[0]["settings"], states[0]["table"]
    for state in states[1:]:
        refuse_other(out, settings, state["settings"])
    done = [record.name for record, state in zip(records, states, strict=True) if state["finished"]]
    missing = [part for part in range(settings["parts"])
               if f"prepare_{part:05d}_of_{settings['parts']:05d}.json" not in done]
    if missing:
        raise UserError(f"{len(missing)} of {settings['parts']} parts in {str(out)!r} are missing or not finished: "
                        f"{', '.join(map(str, missing[:20]))}; prepare them with --part")
    splits = {split: {key: sum(state["splits"][split][key] for state in states)
                      for key in ("tokens", "documents", "bytes", "shards")} for split in ("train", "val")}
    require_tokens(splits, settings)
    splits = {split: about | {"bytes_per_token": round(about["bytes"] / about["tokens"], 4)}
              for split, about in splits.items() if about["tokens"]}
    encoding = get_tokenizer(table)
    meta = {"tokenizer": encoding.name, "vocab_size": encoding.n_vocab,
            "dtype": np.dtype(token_dtype(encoding.n_vocab)).name, "splits": splits, "settings": settings,
            "source": settings["dataset"] or shortened(", ".join(settings["input"]))}
    if not is_complete(out, meta):
        raise UserError(f"out {str(out)!r} has damaged or missing shards: delete it and prepare the data again")
    write_tokenizer(out, table)
    write_meta(out, meta)
    for record in records:
        record.unlink(missing_ok=True)
    hint = longest_seq_len(min(about["tokens"] for about in splits.values()))
    if hint < 256:
        print(f"this is little text: train on it with --seq_len {hint or 32}, or with --seq_len auto")
    return meta


def refuse_other(out: Path, settings: dict, before: dict | None) -> None:
    """Raise UserError if `out` was prepared with other settings, or from other files."""
    if not isinstance(before, dict):
        raise UserError(f"out {str(out)!r} holds data that this command did not make: pass another --out")
    different = [f"{key} {shortened(before.get(key))} there, {shortened(value)} here"
                 for key, value in settings.items() if before.get(key) != value and key != "names_and_sizes"]
    if before != settings:
        raise UserError(f"out {str(out)!r} holds data made with other settings "
                        f"({'; '.join(different) or 'the input files have changed'}): pass another --out, or delete it")


def shortened(value: Any) -> str:
    """A value in at most a hundred characters."""
    text = str(value)
    return text if len(text) <= 100 else text[:97] + "…"


def check_data(data_root: Path) -> None:
    """Look at every token of a data set, and print what is in it. Raises UserError that names the first bad shard."""
    if not data_root.is_dir():
        raise UserError(f"check: {str(data_root)!r} is not a folder")
    meta = read_meta(data_root)
    encoding = get_tokenizer(meta["tokenizer"]) if meta.get("tokenizer") else None
    vocab_size = meta.get("vocab_size", 50257)
    print(f"{data_root}: {encoding.name if encoding else 'unknown tokenizer'}, {vocab_size:,} tokens in the vocabulary")
    for split in meta.get("splits", ("train", "val")):
        paths = find_shards(data_root, split)
        total, ends, seen = 0, [], None
        for path in tqdm(paths, desc=f"checking {split}", unit="shard", disable=None):
            shard = open_shard(path)
            if "dtype" in meta and shard.dtype != meta["dtype"]:
                raise UserError(f"shard {path} has {shard.dtype} tokens, meta.json says {meta['dtype']}")
            for begin in range(0, len(shard), CHECKED_AT_ONCE):
                tokens = shard[begin:begin + CHECKED_AT_ONCE]
                if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
                    raise UserError(f"shard {path} has token ids from {tokens.min()} to {tokens.max()}: the vocabulary "
                                    f"ends at {vocab_size - 1}")
                if encoding:
                    ends.append(np.flatnonzero(tokens == encoding.eot_token) + total + begin)
            total += len(shard)
            seen = shard[:200] if seen is None else seen
        expected = meta.get("splits", {}).get(split, {})
        for name, found in (("tokens", total), ("documents", len(np.concatenate(ends)) if ends else 0)):
            if found != expected.get(name, found) and (name == "tokens" or found):
                raise UserError(f"{data_root} has {found:,} {split} {name}, meta.json says {expected[name]:,}: shards "
                                f"are missing or were changed; prepare the data again")
        line = f"{split}: {len(paths)} shards, {total:,} tokens"
        if "bytes" in expected:
            line += f", {expected['bytes']:,} bytes, {expected['bytes'] / max(total, 1):.2f} bytes per token"
        if ends and len(starts := np.concatenate(ends)):
            lengths = np.diff(np.append(starts, total)) - 1
            line += (f"; {len(starts):,} documents of {lengths.min():,} to {lengths.max():,} tokens, "
                     f"{lengths.mean():,.1f} on average")
        print(line)
        if encoding and seen is not None:
            lines = encoding.decode(seen.tolist()).splitlines()
            print("".join(f"    {line[:110]}\n" for line in lines[:5]), end="")
    print("every token is in the vocabulary, and as many are there as meta.json says" if meta else
          "every token is in the vocabulary")


if __name__ == "__main__":
    cli.run_cli(main, PrepareConfig)
