"""Train a GPT-2 on token shards: python -m scripts.train, or torchrun scripts/train.py"""

import contextlib
import datetime
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

if not __package__:  # run as `torchrun scripts/train.py`: imports start at the repository's root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from gpt.checkpoint import (
    Checkpoint,
    CheckpointManager,
    assert_same_settings,
    load_checkpoint,
    load_latest,
)
from gpt.config import GPTConfig
from gpt.dataloader import DataLoaderLite, grad_accum_steps
from gpt.device import (
    DTYPES,
    Precision,
    device_name,
    find_micro_batch_size,
    fits_in_memory,
    select_compile,
    select_precision,
    tune_device,
    use_deterministic_algorithms,
)
from gpt.distributed import Ranks, init_ranks
from gpt.errors import UserError
from gpt.evaluation import evaluate_loss
from gpt.files import run_lock
from gpt.flops import flops_per_token, peak_flops
from gpt.generation import generate_text
from gpt.hellaswag import Example, evaluate_hellaswag, load_examples
from gpt.metrics import RunLog
from gpt.model import GPT
from gpt.optim import configure_optimizer, get_lr
from gpt.shards import auto_seq_len, find_shards, fingerprint, read_meta, read_tokenizer
from gpt.signals import StopHandler
from gpt.tokenizer import Tokenizer
from scripts.cli import run_cli

MAX_MICRO_BATCH_TOKENS = 65536  # the largest micro-batch whose speed has been measured
TYPICAL_MFU = 0.3  # assumed when predicting the duration of a run


@dataclass
class TrainConfig:
    """Settings of a run. The defaults train GPT-2 124M on Shakespeare."""

    data_root: str = "shakespeare_data"  # folder with train_*.npy and val_*.npy
    log_dir: str = "log"  # output folder; a run found in it is resumed
    init_from: str = "scratch"  # scratch, model_<step>.pt, Hugging Face folder or model name
    # block_size 0: from seq_len or init_from; vocab_size 0: from the data
    model: GPTConfig = field(default_factory=lambda: GPTConfig(block_size=0, vocab_size=0))

    total_batch_size: int = 32768  # tokens per optimizer step, over all GPUs
    # sequences per forward pass per GPU; auto: as many as fit, on a CPU up to 16
    micro_batch_size: int | Literal["auto"] = "auto"
    seq_len: int | Literal["auto"] = 256  # tokens per sequence; auto: 256, less for short data
    max_steps: int = 1000  # optimizer steps to train for
    max_tokens: int = 0  # tokens to train on, overrides max_steps; 0: off
    max_epochs: float = 0  # epochs to train for, overrides max_steps; 0: off
    patience: int = 0  # stop after this many validations without a new best; 0: off
    overfit_one_batch: bool = False  # sanity check: train on the first batch; loss must reach 0
    seed: int = 1337  # random seed for init, data order and dropout

    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: Muon for matrices in blocks, else AdamW
    max_lr: float = 6e-4  # peak learning rate, reached after warmup
    min_lr_ratio: float = 0.1  # final learning rate as a fraction of max_lr
    warmup_steps: int = 100  # linear learning-rate warmup, in steps
    weight_decay: float = 0.1  # weight decay, except biases and LayerNorm
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW beta1, beta2
    grad_clip: float = 1.0  # max gradient norm; 0: no clipping

    eval_every: int = 50  # steps between validation runs; 0: never
    eval_tokens: int = 131072  # validation tokens per evaluation
    save_every: int = 250  # steps between checkpoints; 0: first and last only
    sample_every: int = 250  # steps between generated samples; 0: never
    # prompts for the generated samples
    sample_prompts: list[str] = field(default_factory=lambda: ["\n"])
    sample_tokens: int = 100  # new tokens per generated sample
    hellaswag_every: int = 0  # steps between HellaSwag evaluations; 0: never
    hellaswag_data: str | None = None  # HellaSwag .jsonl file; default: download from the Hub
    hellaswag_limit: int = 0  # evaluate the first N examples; 0: all 10,042
    log_every: int = 1  # steps between console lines; metrics.jsonl has every step
    tensorboard: bool = False  # write TensorBoard files to log_dir
    wandb_project: str | None = None  # Weights & Biases project; default: off

    device: str = "auto"  # auto, cuda, cuda:N, mps or cpu
    precision: Precision = "auto"  # autocast dtype; auto: bf16 or fp16 if native, else float32
    compile: bool | Literal["auto"] = "auto"  # torch.compile; auto: on CUDA with a C compiler
    deterministic: bool = False  # equal bits in every run on a GPU, for exact resume; slower
    rank_timeout: float = 600  # seconds that ranks wait for one another before they abort

    def __post_init__(self) -> None:
        """Raise UserError if a setting is out of range."""
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not 0 <= value < 2**63:
                raise UserError(f"--{name} is {value}: must be at least 0 and below 2^63")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"--betas are {self.betas}: each must be at least 0 and below 1")
        if self.patience and not self.eval_every:
            raise UserError("--patience needs validation: pass an --eval_every above 0")


def main(config: TrainConfig) -> int:
    """Train, and return the exit status: 0, or 128 + the signal that stopped the run early."""
    if config.deterministic:
        use_deterministic_algorithms()
    try:
        with contextlib.ExitStack() as stack:  # closes what train() opens, however it ends
            return train(config, stack)
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        raise UserError(f"{reason}: pass --micro_batch_size auto") from None


def train(config: TrainConfig, stack: contextlib.ExitStack) -> int:
    """Build everything, resume the run in log_dir if there is one, and train; see `main`."""
    ranks = stack.enter_context(init_ranks(config.device, config.rank_timeout))
    assert_lock_held = stack.enter_context(run_lock(config.log_dir, enabled=ranks.is_master))
    tune_device(ranks.device)
    latest = load_latest(config.log_dir, ranks.print, with_optim=True)  # None: a new run
    config, tokenizer = resolve_auto(config, ranks)
    model = init_model(config, tokenizer, latest).to(ranks.device)
    dtype = DTYPES[config.precision]
    autocast = torch.autocast(ranks.device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=dtype == torch.float16)
    config = resolve_micro_batch_size(config, model, autocast, ranks, latest)
    config, train_loader, val_loader, examples = load_data(config, ranks)
    optimizer = configure_optimizer(model, config.optimizer, lr=config.max_lr,
                                    weight_decay=config.weight_decay, betas=config.betas)
    metadata: dict[str, Any] = dict(train_config=asdict(config), data=fingerprint(config.data_root))
    metadata["tokenizer"] = tokenizer.merge_table if tokenizer else None
    checkpoints = CheckpointManager(Path(config.log_dir), ranks, assert_lock_held, model, optimizer,
                                    scaler, metadata)
    step = checkpoints.resume(latest) if latest else 0
    ranks.assert_equal({**asdict(config), **metadata["data"], "step": step})
    log = stack.enter_context(open_log(config, ranks, assert_lock_held, step, model, train_loader))
    ddp = ranks.world_size > 1
    ddp_model: Any = torch.compile(model) if config.compile else model
    if ddp:
        ddp_model = DistributedDataParallel(ddp_model)  # evaluation and sampling use `model`
    n_micro_steps = train_loader.grad_accum_steps
    stop = StopHandler(verbose=ranks.is_master)

    stopping = False
    while not stopping:
        finished = step >= config.max_steps or log.should_stop_early

        # Save before evaluating, which can fail. save() skips a step that is already saved.
        if step == 0 or finished or (config.save_every and step % config.save_every == 0):
            checkpoints.save(step, required=step == 0 or finished)

        # Evaluate and sample. A resumed run does not repeat what is already logged.
        if log.is_due("val", config.eval_every, step, finished):
            batches = val_loader.eval_batches(config.eval_tokens, show_bar=log.bar is not None)
            with autocast:
                val_loss, bits_per_byte = evaluate_loss(model, batches, ranks, tokenizer)
            assert_finite(step, f"validation loss {val_loss}", val_loss)
            if val_loss < log.best_loss:
                checkpoints.save_best(step, val_loss)
            log.log_validation(step, val_loss, bits_per_byte)
            if log.should_stop_early:
                finished = True
                checkpoints.save(step, required=True)
        if log.is_due("samples", config.sample_every, step, finished):
            with autocast:  # the same on all ranks
                texts = generate_text(model, tokenizer, config.sample_prompts, config.sample_tokens,
                                      temperature=0.8, top_k=200, seed=config.seed)
            log.log_samples(step, texts)
        if log.is_due("hellaswag", config.hellaswag_every, step, finished):
            with autocast:
                result = evaluate_hellaswag(model, tokenizer, examples, ranks,
                                            show_bar=log.bar is not None,
                                            stopped=lambda: stop.requested)
            stopping = result is None
            if result:
                log.log_hellaswag(step, result)
        if finished or stopping:
            break

        # One optimizer step: accumulate gradients over micro-steps, clip them, update the weights.
        t0 = time.perf_counter()
        lr = get_lr(step, max_lr=config.max_lr, min_lr_ratio=config.min_lr_ratio,
                    warmup_steps=config.warmup_steps, max_steps=config.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss_sum = torch.zeros((), device=ranks.device)
        for micro_step in range(n_micro_steps):
            x, y = train_loader.batch(0 if config.overfit_one_batch else step, micro_step)  # (B, T)
            seed_dropout(config.seed, step, micro_step, ranks.rank)
            if ddp:  # average the gradients over ranks once per step
                ddp_model.require_backward_grad_sync = micro_step == n_micro_steps - 1
            with autocast:
                loss = ddp_model(x, y) / n_micro_steps
            scaler.scale(loss).backward()
            loss_sum += loss.detach()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        # The step's one wait for the device and for the other ranks.
        train_loss, grad_norm, stop_votes = ranks.mean(loss_sum, norm, stop.requested)
        assert_finite_step(step, train_loss, grad_norm, scaler, ranks)
        log.log_step(step, train_loss, lr, grad_norm, time.perf_counter() - t0)
        stopping = stop_votes > 0
        step += 1

    checkpoints.save(step, required=True)
    log.print_end(step, stopping)
    return 128 + (stop.signum or signal.SIGTERM) if stopping else 0


def resolve_auto(config: TrainConfig, ranks: Ranks) -> tuple[TrainConfig, Any]:
    """Resolve all settings that are 0 or "auto" and do not depend on the model; return them and the
    data's `Tokenizer`, None if it is unknown."""
    meta = read_meta(config.data_root)
    find_shards(config.data_root, "train")  # a wrong folder is named before anything it implies
    vocab_size = config.model.vocab_size or meta.get("vocab_size", 50257)
    default = "gpt2" if vocab_size == 50257 else None
    tokenizer = read_tokenizer(config.data_root, {"tokenizer": default, **meta})
    if not tokenizer:
        ranks.print(f"unknown tokenizer (vocab_size {vocab_size}): no samples and no HellaSwag")
        config = replace(config, sample_every=0, hellaswag_every=0)
    if not config.sample_prompts:
        config = replace(config, sample_every=0)
    if config.overfit_one_batch:
        config = replace(config, eval_every=0, patience=0)  # only that batch's loss matters
    if config.seq_len == "auto":
        splits = ["train", "val"] if config.eval_every else ["train"]
        longest = auto_seq_len(config.data_root, splits)
        config = replace(config, seq_len=min(longest, config.model.block_size or longest))
    if config.init_from == "scratch":  # else the model's config comes from there
        block_size = config.model.block_size or int(config.seq_len)
        model = replace(config.model, vocab_size=vocab_size, block_size=block_size)
        config = replace(config, model=model)
    use_compile = select_compile(config.compile, ranks.device)
    if config.compile == "auto" and ranks.device.type == "cuda" and not use_compile:
        ranks.print("torch.compile is off: it needs a Volta or newer GPU, Triton and a C compiler")
    precision = select_precision(config.precision, ranks.device)
    return replace(config, precision=precision, compile=use_compile), tokenizer


def init_model(config: TrainConfig, tokenizer: Tokenizer | None,
               latest: Checkpoint | None) -> GPT:
    """Return the model on the CPU: from the checkpoint `latest` if there is one, else from
    `init_from`. Raises UserError if it does not fit the settings or the data."""
    if latest:
        assert_same_settings(latest, asdict(config))
        model = GPT.from_checkpoint(latest.model, dropout=config.model.dropout)
    elif config.init_from == "scratch":
        torch.manual_seed(config.seed)
        model = GPT(config.model)
    else:
        checkpoint = load_checkpoint(config.init_from)
        if checkpoint["tokenizer"] != (tokenizer.merge_table if tokenizer else None):
            raise UserError(f"{config.init_from} uses another tokenizer than the data in "
                            f"{config.data_root!r}: prepare the data with the model's tokenizer")
        max_positions = checkpoint["config"]["block_size"]
        if config.model.block_size > max_positions:
            raise UserError(f"--model.block_size is {config.model.block_size}, but "
                            f"{config.init_from} has {max_positions} positions, which can be "
                            f"truncated but not extended")
        block_size = config.model.block_size or max_positions
        model = GPT.from_checkpoint(checkpoint, dropout=config.model.dropout, block_size=block_size)
    if int(config.seq_len) > model.config.block_size:
        raise UserError(f"--seq_len {config.seq_len} exceeds block_size {model.config.block_size}, "
                        f"the model's context length: lower --seq_len or raise --model.block_size")
    return model


def resolve_micro_batch_size(config: TrainConfig, model: GPT,
                             autocast: contextlib.AbstractContextManager, ranks: Ranks,
                             latest: Checkpoint | None) -> TrainConfig:
    """Return the settings with the config of the model and the micro-batch size. "auto" keeps that
    of a resumed run if possible, so that its losses stay equal; else it is the largest divisor of a
    rank's sequences per step that fits."""
    config = replace(config, model=model.config)
    if config.micro_batch_size != "auto":
        return config
    T = int(config.seq_len)
    n_sequences = grad_accum_steps(config.total_batch_size, 1, T, ranks.world_size)

    def fits(size: int) -> bool:
        fits_here = ranks.device.type != "cuda" or fits_in_memory(model, autocast, size, T)
        return ranks.mean(fits_here) == [1.0]  # on all ranks

    largest = MAX_MICRO_BATCH_TOKENS // T if ranks.device.type == "cuda" else 16
    sizes = list(range(largest, 1, -1))
    if latest:
        sizes.insert(0, latest.model["train_config"]["micro_batch_size"])
    return replace(config, micro_batch_size=find_micro_batch_size(n_sequences, sizes, fits))


def load_data(config: TrainConfig,
              ranks: Ranks) -> tuple[TrainConfig, DataLoaderLite, Any, list[Example]]:
    """Return the settings with their final max_steps, the loaders of the train and val splits (val:
    None without validation), and the examples of HellaSwag ([] if it is not evaluated)."""
    loader = partial(DataLoaderLite, config.data_root, seq_len=int(config.seq_len),
                     micro_batch_size=int(config.micro_batch_size),
                     vocab_size=config.model.vocab_size, seed=config.seed, rank=ranks.rank,
                     world_size=ranks.world_size, device=ranks.device)
    train_loader = loader("train", total_batch_size=config.total_batch_size)
    ranks.print(f"found {len(train_loader.shards)} shard(s) for split train")
    val_loader = loader("val") if config.eval_every else None
    if val_loader:
        ranks.print(f"found {len(val_loader.shards)} shard(s) for split val")
    ranks.print(f"using device: {ranks.device}")
    if tokens := config.max_tokens or config.max_epochs * train_loader.epoch_tokens:
        max_steps = math.ceil(tokens / config.total_batch_size)
        config = replace(config, max_steps=max_steps, max_tokens=0, max_epochs=0)
    examples = []
    if config.hellaswag_every:
        examples = load_examples(config.hellaswag_data, config.hellaswag_limit)
    return config, train_loader, val_loader, examples


@contextlib.contextmanager
def open_log(config: TrainConfig, ranks: Ranks, assert_lock_held: Callable[[], None], step: int,
             model: GPT, train_loader: DataLoaderLite) -> Iterator[RunLog]:
    """Print a summary of the run, with its expected duration, and yield its log."""
    n_params = model.num_parameters()
    peak, source = peak_flops(ranks.device, DTYPES[config.precision])
    token_flops = flops_per_token(config.model, n_params, int(config.seq_len))
    peak_seconds = config.total_batch_size * token_flops / (peak * ranks.world_size)
    on_ranks = f" on each of {ranks.world_size} ranks" if ranks.world_size > 1 else ""
    ranks.print(f"{n_params:,} parameters, {config.precision}, a step is "
                f"{train_loader.grad_accum_steps} x {config.micro_batch_size} x {config.seq_len} "
                f"tokens{on_ranks}, peak {peak / 1e12:.3g} TFLOP/s for MFU ({source})")
    log = RunLog(Path(config.log_dir), ranks, assert_lock_held, step, config.max_steps,
                 log_every=config.log_every, patience=config.patience,
                 warmup_steps=config.warmup_steps, vocab_size=config.model.vocab_size,
                 step_tokens=config.total_batch_size, epoch_tokens=train_loader.epoch_tokens,
                 peak_seconds=peak_seconds)
    with contextlib.closing(log):
        if step < config.max_steps and not log.should_stop_early:  # a finished run changes no file
            seconds = math.ceil((config.max_steps - step) * peak_seconds / TYPICAL_MFU)
            advice = ""
            if ranks.device.type == "cpu" and seconds > 3600:
                advice = (": for a small model that trains in minutes, pass --config "
                          "configs/laptop.yaml and a new --log_dir")
            duration = datetime.timedelta(seconds=min(seconds, 10**13))
            ranks.print(f"{config.max_steps - step:,} steps take about {duration} at "
                        f"{TYPICAL_MFU:.0%} MFU{advice}")
            if config.compile:
                ranks.print("compiling the model in the first step (takes a minute or more)")
            train_config = asdict(config)
            log.log_start(train_config, commit=git_commit(), torch=torch.__version__,
                          device=device_name(ranks.device), ranks=ranks.world_size)
            if config.tensorboard or config.wandb_project:
                log.open_trackers(config.wandb_project, train_config)
        yield log


def git_commit() -> str | None:
    """Return this repository's commit, with "-dirty" if files differ from it; None outside a git
    repository."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None


def seed_dropout(*numbers: int) -> None:
    """Seed PyTorch with (seed, step, micro_step, rank), hashed so that nearby values give unrelated
    streams."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def assert_finite(step: int, description: str, *values: float) -> None:
    """Raise UserError with the `description` of the values if one of them is infinite or NaN."""
    if not all(map(math.isfinite, values)):
        raise UserError(f"step {step}: {description}, the run has diverged: lower --max_lr or "
                        f"--grad_clip, or raise --warmup_steps, and rerun to resume from the last "
                        f"checkpoint")


def assert_finite_step(step: int, loss: float, grad_norm: float, scaler: torch.amp.GradScaler,
                       ranks: Ranks) -> None:
    """Raise UserError if step number `step` (from 0) has diverged; print a line if gradients
    overflowed in fp16, which is normal while the loss scale can be lowered: the scaler then skips
    the update."""
    assert_finite(step, f"loss {loss}", loss)
    if scaler.is_enabled() and not math.isfinite(grad_norm) and scaler.get_scale() >= 1:
        ranks.print(f"step {step}: no update, the gradients overflow in fp16; loss scale now "
                    f"{scaler.get_scale():g}")
    else:
        assert_finite(step, f"gradient norm {grad_norm}", grad_norm)


if __name__ == "__main__":
    run_cli(main, TrainConfig)
