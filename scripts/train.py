"""Train a GPT-2 on token shards: python -m scripts.train, or torchrun --nproc_per_node=8 scripts/train.py"""

import contextlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

if not __package__:  # run as `torchrun scripts/train.py`: imports start at the repository's root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
import yaml
from torch.nn.parallel import DistributedDataParallel

from gpt import checkpoint, distributed, hellaswag
from gpt.atomic import atomic_write
from gpt.config import GPTConfig
from gpt.dataloader import DataLoaderLite
from gpt.device import (
    DTYPES,
    Precision,
    disable_malloc_trim,
    hardware_name,
    is_out_of_memory,
    select_compile,
    select_precision,
)
from gpt.errors import UserError
from gpt.evaluation import evaluate
from gpt.flops import flops_per_token, peak_flops
from gpt.generation import generate_text
from gpt.metrics import RunLog
from gpt.model import GPT
from gpt.optim import configure_optimizers, learning_rate
from gpt.run_lock import only_run_in
from gpt.shards import auto_seq_len, read_meta
from gpt.signals import StopSignal
from gpt.tokenizer import get_tokenizer, token_bytes, tokenizer_name
from scripts import command_line


@dataclass
class TrainConfig:
    """Settings of a run. The defaults train GPT-2 124M on Shakespeare."""

    # Data and folders
    data_root: str = "shakespeare_data"
    """folder with train_*.npy and val_*.npy"""
    log_dir: str = "log"
    """checkpoints, metrics; a run there is continued"""
    init_from: str = "scratch"
    """or a model_<step>.pt, a folder, a hub name"""

    # Shape of a new model; 0: as seq_len or init_from, as the data
    model: GPTConfig = field(default_factory=lambda: GPTConfig(block_size=0, vocab_size=0))
    """the shape"""

    # Batches, and how long to train
    total_batch_size: int = 32768
    """tokens in a step, over all processes"""
    micro_batch_size: int = 16
    """windows a process takes at once (memory)"""
    seq_len: int | Literal["auto"] = 256
    """tokens in a window; auto: as short data allows"""
    max_steps: int = 1000
    """updates in the run"""
    max_tokens: int = 0
    """instead of max_steps: tokens to train on; 0: off"""
    max_epochs: float = 0
    """instead of max_steps: times through the data"""
    patience: int = 0
    """validations without a new best, then stop; 0: off"""
    overfit_one_batch: bool = False
    """first step's data only: the loss must go to 0"""
    seed: int = 1337
    """of the weights, the order of data and dropout"""

    # Optimizer
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw, or muon for the blocks' matrices"""
    max_lr: float = 6e-4
    """learning rate at the end of the warmup"""
    min_lr_ratio: float = 0.1
    """last learning rate, as a share of max_lr"""
    warmup_steps: int = 100
    """updates in which the learning rate rises"""
    weight_decay: float = 0.1
    """of matrices and embeddings"""
    betas: tuple[float, float] = (0.9, 0.95)
    """decay rates of AdamW's two averages"""
    grad_clip: float = 1.0
    """longest gradient, a norm; 0: no limit"""

    # Validation, checkpoints, samples, logs
    eval_every: int = 50
    """steps between validations; 0: none"""
    eval_tokens: int = 131072
    """tokens of the val split to validate on"""
    save_every: int = 250
    """steps between checkpoints; 0: first, last"""
    sample_every: int = 250
    """steps between sample texts; 0: none"""
    sample_prompts: list[str] = field(default_factory=lambda: ["\n"])
    """beginnings of the sample texts"""
    sample_tokens: int = 100
    """tokens in a sample text"""
    hellaswag_every: int = 0
    """steps between HellaSwag evaluations; 0: none"""
    hellaswag_data: str | None = None
    """its examples, a .jsonl file; else the hub's"""
    hellaswag_limit: int = 0
    """use the first examples only; 0: all 10,042"""
    log_every: int = 1
    """steps between lines (metrics.jsonl: every one)"""
    tensorboard: bool = False
    """write files for TensorBoard to log_dir"""
    wandb_project: str | None = None
    """project of Weights & Biases to log to"""

    # The machine
    device: str = "auto"
    """auto, cuda, mps or cpu"""
    precision: Precision = "auto"
    """autocast dtype; auto: bf16 or fp16 where native"""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile; auto: on CUDA with a C compiler"""
    rank_timeout: float = 600
    """seconds processes wait for one another"""


def main(config: TrainConfig) -> int:
    """Train, and return the exit status: 0, or 128 + the signal that ended the run early."""
    check(config)
    with (distributed.joined(config.device, config.rank_timeout) as dist,
          only_run_in(config.log_dir) if dist.is_master else contextlib.nullcontext(),
          contextlib.closing(RunLog(config.log_dir, dist.is_master, config.tensorboard, config.wandb_project)) as log):
        try:
            return train(config, dist, log, StopSignal(speaks=dist.is_master))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise UserError(out_of_memory_advice(config, dist)) from None
            raise


def train(config: TrainConfig, dist: distributed.Distributed, log: RunLog, stop: StopSignal) -> int:
    """The run, from top to bottom; returns the exit status."""
    device, log_dir = dist.device, Path(config.log_dir)

    # Data.
    meta = read_meta(config.data_root)
    if config.seq_len == "auto":
        fits = auto_seq_len(config.data_root, ("train", "val") if config.eval_every else ("train",))
        config = replace(config, seq_len=min(fits, config.model.block_size or fits))
    vocab_size = config.model.vocab_size or meta.get("vocab_size", 50257)
    tokenizer = meta.get("tokenizer", "gpt2" if vocab_size == 50257 else None)
    encoding = get_tokenizer(tokenizer) if tokenizer else None
    if encoding and vocab_size > encoding.n_vocab:
        raise UserError(f"model.vocab_size {vocab_size} is more than the {encoding.n_vocab} tokens of {encoding.name}: "
                        f"leave it out, the vocabulary is never padded")
    seq_len = int(config.seq_len)
    loader_settings: dict[str, Any] = dict(
        data_root=config.data_root, micro_batch_size=config.micro_batch_size, seq_len=seq_len, vocab_size=vocab_size,
        device=device, rank=dist.rank, world_size=dist.world_size)
    train_loader = DataLoaderLite(split="train", total_batch_size=config.total_batch_size, seed=config.seed,
                                  **loader_settings)
    if config.overfit_one_batch:
        config = replace(config, eval_every=0)  # whether it learns that batch is all one wants to know
    val_loader = DataLoaderLite(split="val", **loader_settings) if config.eval_every else None
    epoch_tokens = train_loader.n_windows * seq_len
    if tokens := config.max_tokens or config.max_epochs * epoch_tokens:
        config = replace(config, max_steps=math.ceil(tokens / config.total_batch_size), max_tokens=0, max_epochs=0)
    log.print(f"found {len(train_loader.shards)} shards for split train")
    if val_loader:
        log.print(f"found {len(val_loader.shards)} shards for split val")
    log.print(f"using device: {device}")
    use_compile, why_not = select_compile(config.compile, device)
    config = replace(config, precision=select_precision(config.precision, device), compile=use_compile)
    if why_not:
        log.print(why_not)
    if config.sample_every and not encoding:
        log.print(f"no tokenizer is known for these {vocab_size} token ids: there will be no samples of text")
    if config.hellaswag_every and not encoding:
        raise UserError(f"hellaswag_every is {config.hellaswag_every}, but no tokenizer is known for these "
                        f"{vocab_size} token ids: leave it 0")
    examples = hellaswag.load_examples(config.hellaswag_data, config.hellaswag_limit) if config.hellaswag_every else []

    # The model, and where the run stands: at the newest checkpoint in log_dir, if there is one.
    last_saved, saved, saved_optim = checkpoint.newest(log_dir, log.print, resumable=True) or (None, None, None)
    model = starting_model(config, vocab_size, tokenizer, saved)
    step = first_step = saved["step"] if saved else 0
    dist.check_same({**asdict(config), "step": step, "train windows": train_loader.n_windows},
                    "start all with the same flags, the same data and one log_dir that all of them see")
    if saved and step >= config.max_steps:
        log.print(f"{last_saved}: the run is finished, step {step} of {config.max_steps}; raise --max_steps, or what "
                  f"stands for it, to go on, or pass another --log_dir")
        return 0
    train_loader.micro_batch = step * train_loader.grad_accum_steps

    # The model as it is trained: on its device, compiled, its gradients averaged over ranks. Evaluating, sampling
    # and saving use `model` itself, which shares the weights, and so never compile anything again.
    model.to(device)
    if device.type == "cpu":
        disable_malloc_trim()
    trained: Any = torch.compile(model) if config.compile else model
    if dist.world_size > 1:
        trained = DistributedDataParallel(trained, device_ids=[device] if device.type == "cuda" else None)
    dtype = DTYPES[config.precision]
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what is left in float32
    optimizers = configure_optimizers(model, config.optimizer, lr=config.max_lr, weight_decay=config.weight_decay,
                                      betas=config.betas)

    settings = json.loads(json.dumps(asdict(replace(config, model=model.config))))  # tuples become lists
    step_flops = flops_per_token(model.config, model.num_parameters(), seq_len) * config.total_batch_size
    peak, peak_source = peak_flops(device, dtype)
    log.print(f"{model.num_parameters():,} parameters, {config.precision}, a step is "
              f"{train_loader.grad_accum_steps} x {config.micro_batch_size} x {config.seq_len} tokens"
              + (f" on each of {dist.world_size} processes" if dist.world_size > 1 else "")
              + f", MFU of {peak / 1e12:.3g} TFLOP/s ({peak_source})")
    done_step = -1  # the step whose validation and checkpoint are there already
    if saved and saved_optim:
        checkpoint.load_optimizers(saved_optim, optimizers, scaler)
        if all(saved.get(result) is not None or not due(every, step, config.max_steps) for result, every in (
                ("val_loss", config.eval_every), ("hellaswag", config.hellaswag_every))):
            done_step = step
        changed = checkpoint.changed_settings(saved, settings, train_loader.n_windows)
        log.print(f"resuming from {last_saved} at step {step} of {config.max_steps}"
                  f"{changed and ', changed: ' + changed}")
        saved = saved_optim = None  # gigabytes
    if dist.is_master:
        with atomic_write(log_dir / "config.yaml") as file:
            file.write(yaml.safe_dump(settings, sort_keys=False).encode())
    bytes_of = torch.from_numpy(token_bytes(encoding, model.config.vocab_size) if encoding else
                                np.zeros(model.config.vocab_size, dtype=np.int64)).to(device)
    best_loss, waited = dist.all_gather(torch.tensor(log.start(step, settings, evaluated=step == done_step),
                                                     dtype=torch.float64))[0]  # as rank 0 has it
    kept_loss = best_loss  # that of model_best.pt
    stopping = False
    while True:
        # Between two updates: evaluate, sample, save. The first checkpoint comes before the first update, so that a
        # folder that cannot take it is found out now and not after an hour.
        finished = step == config.max_steps or 0 < config.patience <= waited
        evaluating = due(config.eval_every, step, config.max_steps) and (finished or not stopping)
        if step != done_step:
            val_loss = accuracy = None
            if evaluating and val_loader:
                windows = log.progress("validation", val_loader.eval_windows(config.eval_tokens))
                val_loss, bits_per_byte = evaluate(model, map(val_loader.read, windows), autocast, dist, bytes_of)
                check_finite(f"step {step}: validation loss {val_loss}", val_loss, config, last_saved)
                log.validation(step=step, loss=val_loss, bits_per_byte=bits_per_byte)
                best_loss, waited = (val_loss, 0) if val_loss < best_loss else (best_loss, waited + 1)
                finished = finished or 0 < config.patience <= waited
            last_step = step if finished else config.max_steps
            sampling, choosing = (due(every, step, last_step) and (finished or not stopping)
                                  for every in (config.sample_every, config.hellaswag_every))
            if sampling and encoding and dist.is_master:
                with autocast:
                    texts = generate_text(model, encoding, config.sample_prompts, config.sample_tokens,
                                          temperature=0.8, top_k=200, seed=config.seed)
                log.samples(step=step, texts=texts)
            if choosing and encoding:
                accuracy = hellaswag.evaluate(model, encoding, examples, dist, dtype, show_bar=log.bar is not None,
                                              stopped=lambda: stop.signum > 0)
                if accuracy:
                    log.hellaswag(step=step, **accuracy)
            if evaluating or sampling or choosing:
                stopping = dist.any(stopping or stop.signum > 0)  # it took a while
            saving = due(config.save_every, step, config.max_steps) or step == 0 or finished or stopping
            if saving:
                norm = torch.nn.utils.get_total_norm(model.parameters()).item()
                check_finite(f"step {step}: norm of the weights {norm}", norm, config, last_saved)
                dist.check_same({"weights": checkpoint.fingerprint(model.state_dict())}, f"a processor or its memory "
                                f"is faulty, nothing is saved; go on from {last_saved} without that machine",
                                alike=hardware_name(device))
            if dist.is_master:
                about = dict(step=step, val_loss=val_loss, hellaswag=accuracy, tokenizer=tokenizer,
                             train_config=settings, train_windows=train_loader.n_windows)
                try:
                    if val_loss is not None and val_loss < kept_loss:
                        checkpoint.save_model(log_dir / "model_best.pt", model, **about)
                        kept_loss = val_loss
                    if saving:
                        log.sync()
                        last_saved = checkpoint.save(log_dir, model, optimizers, scaler, **about)
                        log.print(f"saved {last_saved}")
                except OSError as error:  # a full disk may have room again at the next save
                    what = f"step {step} is not saved ({error}), the last checkpoint is {last_saved}"
                    if step == 0 or finished or stopping:
                        raise UserError(f"{what}: make room, say, then the same command goes on from there") from None
                    log.print(f"warning: {what}; training goes on to the next save")
        if finished or stopping:
            dist.barrier()  # where one process leaves, torchrun ends the others: not before the save is done
        if finished:
            if step < config.max_steps:
                log.print(f"finished at step {step} of {config.max_steps}: no better loss than {best_loss:.4f} in "
                          f"{waited:.0f} validations; raise --patience, or pass 0, to go on")
            return 0
        if stopping:
            log.print(f"stopped at step {step} of {config.max_steps}; the same command goes on from there")
            return 128 + (stop.signum or signal.SIGTERM)

        # One update.
        if step == first_step and config.compile:
            log.print("compiling the model: the first step takes a minute or more")
        began = time.perf_counter()
        mean_loss = torch.zeros((), device=device)
        if config.overfit_one_batch:
            train_loader.micro_batch = 0
        for micro_step in range(train_loader.grad_accum_steps):
            x, y = train_loader.next_batch()  # each (B, T)
            if model.config.dropout:
                torch.manual_seed(dropout_seed(config.seed, step, micro_step, dist.rank))
            last = micro_step == train_loader.grad_accum_steps - 1  # ranks average their gradients once, after it
            with contextlib.nullcontext() if last or dist.world_size == 1 else trained.no_sync():
                with autocast:
                    loss = trained(x, y) / train_loader.grad_accum_steps
                scaler.scale(loss).backward()
            mean_loss += loss.detach()
        lr = learning_rate(step, max_lr=config.max_lr, min_lr_ratio=config.min_lr_ratio,
                           warmup_steps=config.warmup_steps, max_steps=config.max_steps)
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        overflow = scaler.is_enabled() and not torch.isfinite(grad_norm)  # fp16: no optimizer may use such gradients
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            if not overflow:
                scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()

        # The step's one wait for the device: every rank's loss, gradient norm, and whether it was told to stop.
        stats = torch.stack([mean_loss, grad_norm, torch.tensor(float(stop.signum > 0), device=device)])
        losses, grad_norms, stop_votes = zip(*dist.all_gather(stats), strict=True)
        train_loss, grad_norm = sum(losses) / dist.world_size, grad_norms[0]
        seconds = time.perf_counter() - began
        stop.worth_saving = True  # from now on a signal waits for the end of a step
        for rank, loss in enumerate(losses):
            where = f" on rank {rank}" if dist.world_size > 1 else ""
            check_finite(f"step {step}: loss {loss}{where}, gradient norm {grad_norm}", loss, config, last_saved)
        if overflow and scaler.get_scale() >= 1:
            log.print(f"step {step}: no update, the gradients overflow in fp16; loss scale now {scaler.get_scale():g}")
        else:
            check_finite(f"step {step}: gradient norm {grad_norm}", grad_norm, config, last_saved)
        log.step(step=step, loss=train_loss, lr=lr, grad_norm=grad_norm, seconds=seconds,
                 mfu=step_flops / seconds / (peak * dist.world_size), batch_tokens=config.total_batch_size,
                 epoch=(step + 1) * config.total_batch_size / epoch_tokens,
                 peak_memory=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0,
                 line=step % config.log_every == 0 or step + 1 == config.max_steps)
        log.warn(vocab_size, config.warmup_steps)
        hours = seconds * (config.max_steps - step - 1) / 3600
        if step == first_step and device.type == "cpu" and hours > 1:
            log.print(f"at {seconds:.2g} s a step this run takes about {hours:.0f} hours on this CPU; a small model "
                      f"learns in minutes with --config configs/laptop.yaml (and another --log_dir, or an empty one)")
        stopping = any(stop_votes)
        step += 1


def check(config: TrainConfig) -> None:
    """Raise UserError for a number that cannot be meant and for a log_dir that cannot be written to."""
    for name in ("max_steps", "max_tokens", "max_epochs", "patience", "seed", "warmup_steps", "weight_decay",
                 "grad_clip", "min_lr_ratio", "eval_every", "save_every", "sample_every", "hellaswag_every",
                 "hellaswag_limit"):
        if not 0 <= getattr(config, name) < 2**63:
            raise UserError(f"{name} is {getattr(config, name)}: it must be 0 or more, and below 2^63")
    for name in ("max_lr", "eval_tokens", "sample_tokens", "log_every", "rank_timeout"):
        if not 0 < getattr(config, name) < math.inf:
            raise UserError(f"{name} is {getattr(config, name)}: it must be more than 0, and finite")
    if config.max_tokens and config.max_epochs:
        raise UserError("max_tokens and max_epochs both say how long to train: pass one of them")
    if config.patience and not config.eval_every:
        raise UserError(f"patience is {config.patience}, but eval_every is 0: there are no validations to wait for")
    if config.min_lr_ratio > 1:
        raise UserError(f"min_lr_ratio is {config.min_lr_ratio}: it must be at most 1, where the learning rate stays")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise UserError(f"betas are {config.betas}: each must be at least 0 and below 1")
    if config.sample_every and not all(config.sample_prompts or [""]):
        raise UserError("sample_prompts has an empty text or none at all: a sample begins with at least one token")
    try:
        Path(config.log_dir).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"log_dir {config.log_dir!r} cannot be made ({error.strerror}): pass another one") from None
    if not os.access(config.log_dir, os.W_OK):
        raise UserError(f"log_dir {config.log_dir!r} cannot be written to: pass another one, or change its permissions")


def starting_model(config: TrainConfig, vocab_size: int, tokenizer: str | None, saved: dict | None) -> GPT:
    """The model to begin with, on the CPU: of the checkpoint `saved` in log_dir, else as init_from says.

    Raises UserError where a checkpoint does not fit the settings.
    """
    before = saved and saved.get("train_config") or {}
    began = before.get("init_from", config.init_from)
    if before.get("overfit_one_batch", config.overfit_one_batch) != config.overfit_one_batch:
        raise UserError(f"log_dir {config.log_dir!r} holds a run in which overfit_one_batch is "
                        f"{not config.overfit_one_batch}: pass another --log_dir")
    if began != config.init_from:
        raise UserError(f"log_dir {config.log_dir!r} holds a run that began with init_from {began}, not with "
                        f"{config.init_from}: pass another --log_dir to begin a new run")
    seq_len = int(config.seq_len)
    wanted = replace(config.model, vocab_size=vocab_size, block_size=config.model.block_size or seq_len)
    if saved:
        model = GPT.from_checkpoint(saved, dropout=wanted.dropout)
        there, here = asdict(model.config), asdict(wanted)
        if config.init_from != "scratch":  # all else comes from there
            here = {"block_size": config.model.block_size or there["block_size"]}
        differences = [f"{name} {there[name]} there, {here[name]} here" for name in here if here[name] != there[name]]
        if differences:
            raise UserError(f"log_dir {config.log_dir!r} holds a run of another shape ({'; '.join(differences)}): pass "
                            f"its settings to go on with it, or another --log_dir to begin a new run")
    elif config.init_from == "scratch":
        torch.manual_seed(config.seed)
        model = GPT(wanted)
    else:
        start = checkpoint.load(config.init_from)
        longest, theirs = start["config"]["block_size"], start.get("tokenizer")
        if config.model.block_size > longest:
            raise UserError(f"model.block_size {config.model.block_size} is more than the {longest} positions of "
                            f"{config.init_from}: they can be cut off, not made up")
        if theirs != tokenizer:
            names = [known and tokenizer_name(known) for known in (theirs, tokenizer)]
            raise UserError(f"{config.init_from} has the tokenizer {names[0]}, the data in {config.data_root!r} has "
                            f"{names[1]}: prepare the data with the tokenizer of the model")
        model = GPT.from_checkpoint(start, dropout=wanted.dropout, block_size=config.model.block_size or longest)
    if model.config.vocab_size < vocab_size:
        raise UserError(f"{config.init_from} knows {model.config.vocab_size} tokens, the data in {config.data_root!r} "
                        f"has {vocab_size}: prepare the data with the tokenizer of the checkpoint")
    if seq_len > model.config.block_size:
        raise UserError(f"seq_len {seq_len} is more than block_size {model.config.block_size}, the longest "
                        f"context of the model: lower --seq_len or raise --model.block_size")
    return model


def due(every: int, step: int, max_steps: int) -> bool:
    """Whether what happens every `every` steps and at the end happens after `step` updates; never if `every` is 0."""
    return every > 0 and step > 0 and (step % every == 0 or step == max_steps)


def check_finite(what: str, value: float, config: TrainConfig, last_saved: Path | None) -> None:
    """Raise UserError if the run has diverged: `value` is infinite or not a number."""
    if not math.isfinite(value):
        raise UserError(f"{what}: the run has diverged and stops here, nothing of it is saved; the same command goes "
                        f"on from {last_saved}: give it a lower --max_lr (now {config.max_lr:g}), more --warmup_steps "
                        f"or --grad_clip 1.0")


def out_of_memory_advice(config: TrainConfig, dist: distributed.Distributed) -> str:
    """Return an error message that names the next smaller micro-batch that divides the step."""
    what = f"{dist.device} is out of memory with --micro_batch_size {config.micro_batch_size}"
    if config.seq_len == "auto" or config.micro_batch_size == 1:
        return f"{what}: use a smaller model or a shorter --seq_len"
    sequences = config.total_batch_size // config.seq_len // dist.world_size  # per rank and step
    smaller = next(b for b in range(config.micro_batch_size // 2, 0, -1) if sequences % b == 0)
    return f"{what}: pass --micro_batch_size {smaller} (the same run with the same losses, in smaller pieces)"


def dropout_seed(*numbers: int) -> int:
    """A 64-bit seed from (seed, step, micro-step, rank), well mixed: neighbours have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


if __name__ == "__main__":
    command_line.run(main, TrainConfig)
