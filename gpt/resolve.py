"""Resolve every 0 and "auto" in a run's settings before the first step, and build the run's model."""

import math
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from gpt.checkpoint import load_checkpoint
from gpt.dataloader import DataLoaderLite
from gpt.device import select_compile, select_precision
from gpt.distributed import Distributed
from gpt.errors import UserError
from gpt.model import GPT
from gpt.shards import auto_seq_len, read_meta, read_tokenizer
from gpt.tokenizer import Tokenizer


def check_config(config: Any) -> None:
    """Raise UserError if a `scripts.train.TrainConfig` has invalid values or a log_dir that is not writable."""
    for name in ("max_steps", "max_tokens", "max_epochs", "patience", "seed", "warmup_steps", "weight_decay",
                 "grad_clip", "min_lr_ratio", "eval_every", "save_every", "sample_every", "hellaswag_every",
                 "hellaswag_limit"):
        if not 0 <= getattr(config, name) < 2**63:
            raise UserError(f"--{name} is {getattr(config, name)}: must be at least 0 and below 2^63")
    for name in ("max_lr", "eval_tokens", "sample_tokens", "log_every", "rank_timeout"):
        if not 0 < getattr(config, name) < math.inf:
            raise UserError(f"--{name} is {getattr(config, name)}: must be above 0 and finite")
    if config.max_tokens and config.max_epochs:
        raise UserError("--max_tokens and --max_epochs are mutually exclusive: pass one of them")
    if config.patience and not config.eval_every:
        raise UserError(f"--patience is {config.patience}, but --eval_every is 0: early stopping needs validation")
    if config.min_lr_ratio > 1:
        raise UserError(f"--min_lr_ratio is {config.min_lr_ratio}: must be between 0 and 1 (1: constant learning rate "
                        f"after warmup)")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise UserError(f"--betas are {config.betas}: each must be at least 0 and below 1")
    if config.sample_every and not all(config.sample_prompts or [""]):
        raise UserError(f"--sample_prompts is {config.sample_prompts}: expected one or more non-empty prompts")
    try:
        Path(config.log_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create --log_dir {config.log_dir!r} ({error.strerror}): pass another one") from None
    if not os.access(config.log_dir, os.W_OK):
        raise UserError(f"--log_dir {config.log_dir!r} is not writable: pass another one or change its permissions")


def resolve(config: Any, dist: Distributed, checkpoint: dict | None, report: Callable[[str], None]
            ) -> tuple[Any, GPT, Tokenizer | None, DataLoaderLite, DataLoaderLite | None]:
    """Return the resolved settings, the model on this rank's device, the data's tokenizer (None if unknown), and the
    loaders of the train and val splits (val: None without validation).

    config: a `scripts.train.TrainConfig`. checkpoint: the newest one in log_dir, from which the model is then loaded.
    Raises UserError if the settings, the data and the checkpoint do not match.
    """
    device = dist.device
    if config.overfit_one_batch:
        config = replace(config, eval_every=0)  # only the loss of that batch matters
    meta = read_meta(config.data_root)
    if config.seq_len == "auto":
        fits = auto_seq_len(config.data_root, ("train", "val") if config.eval_every else ("train",))
        config = replace(config, seq_len=min(fits, config.model.block_size or fits))
    vocab_size = config.model.vocab_size or meta.get("vocab_size", 50257)
    tokenizer = read_tokenizer(config.data_root, {"tokenizer": "gpt2" if vocab_size == 50257 else None, **meta})
    if tokenizer and vocab_size > tokenizer.n_vocab:
        raise UserError(f"--model.vocab_size {vocab_size} exceeds the {tokenizer.n_vocab} tokens of {tokenizer.name}: "
                        f"omit the flag (the vocabulary is never padded)")
    if config.hellaswag_every and not tokenizer:
        raise UserError(f"--hellaswag_every is {config.hellaswag_every}, but no tokenizer is known for the data "
                        f"(vocab_size {vocab_size}): pass --hellaswag_every 0")

    loader_args: dict[str, Any] = dict(
        data_root=config.data_root, micro_batch_size=config.micro_batch_size, seq_len=config.seq_len,
        vocab_size=vocab_size, device=device, rank=dist.rank, world_size=dist.world_size)
    train_loader = DataLoaderLite(split="train", total_batch_size=config.total_batch_size, seed=config.seed,
                                  **loader_args)
    report(f"found {len(train_loader.shards)} shards for split train")
    val_loader = DataLoaderLite(split="val", **loader_args) if config.eval_every else None
    if val_loader:
        report(f"found {len(val_loader.shards)} shards for split val")
    if tokens := config.max_tokens or config.max_epochs * train_loader.n_sequences * config.seq_len:
        config = replace(config, max_steps=math.ceil(tokens / config.total_batch_size), max_tokens=0, max_epochs=0)

    report(f"using device: {device}")
    if config.sample_every and not tokenizer:
        report(f"no tokenizer is known for the data (vocab_size {vocab_size}): no samples are generated")
        config = replace(config, sample_every=0)
    use_compile, why_not = select_compile(config.compile, device)
    if why_not:
        report(why_not)
    config = replace(config, precision=select_precision(config.precision, device), compile=use_compile)
    model = init_model(config, vocab_size, tokenizer, checkpoint).to(device)
    return replace(config, model=model.config), model, tokenizer, train_loader, val_loader


def out_of_memory_advice(config: Any, dist: Distributed) -> str:
    """Return an error message with the next smaller micro_batch_size that divides the step."""
    message = f"{dist.device} is out of memory with --micro_batch_size {config.micro_batch_size}"
    if config.micro_batch_size == 1:
        return f"{message}: use a smaller model or a shorter --seq_len"
    sequences = config.total_batch_size // config.seq_len // dist.world_size  # per rank and step
    smaller = next(b for b in range(config.micro_batch_size // 2, 0, -1) if sequences % b == 0)
    return f"{message}: pass --micro_batch_size {smaller} (same steps and losses, more micro-steps)"


def init_model(config: Any, vocab_size: int, tokenizer: Tokenizer | None, checkpoint: dict | None) -> GPT:
    """Return the initial model on the CPU: from `checkpoint` if there is one, else from `init_from`.

    Raises UserError if a checkpoint does not match the settings.
    """
    ckpt_settings = (checkpoint or {}).get("train_config") or {}
    for name in ("overfit_one_batch", "init_from"):
        if ckpt_settings.get(name, getattr(config, name)) != getattr(config, name):
            raise UserError(f"log_dir {config.log_dir!r} has a run with --{name} {ckpt_settings[name]}, not "
                            f"{getattr(config, name)}: pass another --log_dir to start a new run")
    requested = replace(config.model, vocab_size=vocab_size, block_size=config.model.block_size or config.seq_len)
    if checkpoint:
        model = GPT.from_checkpoint(checkpoint, dropout=requested.dropout)
        ckpt_config, expected = asdict(model.config), asdict(requested)
        if config.init_from != "scratch":  # the rest comes from the initial model
            expected = {"block_size": config.model.block_size or ckpt_config["block_size"]}
        differences = [f"{name}: checkpoint {ckpt_config[name]}, requested {value}"
                       for name, value in expected.items() if value != ckpt_config[name]]
        if differences:
            raise UserError(f"log_dir {config.log_dir!r} has a checkpoint with another model config "
                            f"({'; '.join(differences)}): use the same --model.* settings to resume, or another "
                            f"--log_dir")
    elif config.init_from == "scratch":
        torch.manual_seed(config.seed)
        model = GPT(requested)
    else:
        init_ckpt = load_checkpoint(config.init_from)
        max_positions = init_ckpt["config"]["block_size"]
        if config.model.block_size > max_positions:
            raise UserError(f"--model.block_size {config.model.block_size} exceeds the {max_positions} positions of "
                            f"{config.init_from}: pass {max_positions} or less (position embeddings can be truncated, "
                            f"not extended)")
        if (merge_table := init_ckpt.get("tokenizer")) != (tokenizer and tokenizer.merge_table):
            names = merge_table and Tokenizer(merge_table).name, tokenizer and tokenizer.name
            raise UserError(f"{config.init_from} has the tokenizer {names[0]}, the data in {config.data_root!r} has "
                            f"{names[1]}: prepare the data with the model's tokenizer")
        model = GPT.from_checkpoint(init_ckpt, dropout=requested.dropout,
                                    block_size=config.model.block_size or max_positions)
    if model.config.vocab_size < vocab_size:
        raise UserError(f"{config.init_from} has a vocabulary of {model.config.vocab_size} tokens, the data in "
                        f"{config.data_root!r} one of {vocab_size}: prepare the data with the model's tokenizer")
    if config.seq_len > model.config.block_size:
        raise UserError(f"--seq_len {config.seq_len} exceeds block_size {model.config.block_size}, the model's context "
                        f"length: lower --seq_len or raise --model.block_size")
    return model
