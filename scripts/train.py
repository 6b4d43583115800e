"""Train a GPT-2 on token shards: python -m scripts.train, or torchrun --nproc_per_node=8 scripts/train.py"""

import contextlib
import json
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

if not __package__:  # run as `torchrun scripts/train.py`: imports start at the repository's root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from gpt import hellaswag
from gpt.checkpoint import CheckpointManager
from gpt.config import GPTConfig
from gpt.device import DTYPES, Precision, is_out_of_memory, tune_device
from gpt.distributed import Distributed, init_distributed
from gpt.errors import UserError
from gpt.evaluation import evaluate_loss
from gpt.files import run_lock
from gpt.generation import generate_text
from gpt.metrics import RunLog
from gpt.optim import configure_optimizer, get_lr
from gpt.resolve import check_config, out_of_memory_advice, resolve
from gpt.shards import fingerprint
from gpt.signals import StopHandler
from scripts.cli import run_cli


@dataclass
class TrainConfig:
    """Settings of a run. The defaults train GPT-2 124M on Shakespeare."""

    data_root: str = "shakespeare_data"  # folder with train_*.npy and val_*.npy
    log_dir: str = "log"  # output folder; a run found in it is resumed
    init_from: str = "scratch"  # scratch, or initial weights: model_<step>.pt, Hugging Face folder or model name
    # block_size 0: from seq_len or init_from; vocab_size 0: from the data
    model: GPTConfig = field(default_factory=lambda: GPTConfig(block_size=0, vocab_size=0))

    total_batch_size: int = 32768  # tokens per optimizer step, over all GPUs
    micro_batch_size: int = 16  # sequences per forward pass per GPU; lower if out of memory
    seq_len: int | Literal["auto"] = 256  # tokens per sequence; auto: 256, or less if the data is short
    max_steps: int = 1000  # optimizer steps to train for
    max_tokens: int = 0  # tokens to train on, overrides max_steps; 0: off
    max_epochs: float = 0  # epochs to train for, overrides max_steps; 0: off
    patience: int = 0  # evaluations without a new best val loss before the run stops early; 0: off
    overfit_one_batch: bool = False  # sanity check: train on the first batch only; the loss must reach 0
    seed: int = 1337  # random seed for init, data order and dropout

    optimizer: Literal["adamw", "muon"] = "adamw"  # adamw, or muon (Muon for 2-D block weights, AdamW for the rest)
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
    sample_prompts: list[str] = field(default_factory=lambda: ["\n"])  # prompts for the generated samples
    sample_tokens: int = 100  # new tokens per generated sample
    hellaswag_every: int = 0  # steps between HellaSwag evaluations; 0: never
    hellaswag_data: str | None = None  # HellaSwag .jsonl file; unset: download from HF hub
    hellaswag_limit: int = 0  # evaluate the first N examples; 0: all 10,042
    log_every: int = 1  # steps between console lines; metrics.jsonl has every step
    tensorboard: bool = False  # write TensorBoard files to log_dir
    wandb_project: str | None = None  # Weights & Biases project; unset: off

    device: str = "auto"  # auto, cuda, cuda:N, mps or cpu
    precision: Precision = "auto"  # autocast dtype; auto: bf16 or fp16 if native, else float32
    compile: bool | Literal["auto"] = "auto"  # torch.compile; auto: on CUDA, if there is a C compiler
    rank_timeout: float = 600  # seconds without progress before all ranks abort


def main(config: TrainConfig) -> int:
    """Train, and return the exit status: 0, or 128 + the signal that ended the run early."""
    check_config(config)
    with (init_distributed(config.device, config.rank_timeout) as dist,
          run_lock(config.log_dir) if dist.is_master else contextlib.nullcontext(),
          contextlib.closing(RunLog(config, dist)) as log):
        tune_device(dist.device)
        try:
            return train(config, dist, log, StopHandler(verbose=dist.is_master))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise UserError(out_of_memory_advice(log.config, dist)) from None
            raise


def train(config: TrainConfig, dist: Distributed, log: RunLog, stop: StopHandler) -> int:
    """Start or resume training, run it to the end and return the exit status."""
    checkpoints = CheckpointManager(config.log_dir, dist, log)
    config, model, tokenizer, train_loader, val_loader = resolve(config, dist, checkpoints.model_state, log.print)
    examples = hellaswag.load_examples(config.hellaswag_data, config.hellaswag_limit) if config.hellaswag_every else []
    optimizer = configure_optimizer(model, config.optimizer, lr=config.max_lr, weight_decay=config.weight_decay,
                                    betas=config.betas)
    dtype = DTYPES[config.precision]
    autocast = torch.autocast(dist.device.type, dtype, enabled=dtype != torch.float32)
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dtype == torch.float16)

    # Resume from the newest checkpoint in log_dir, if there is one.
    settings = json.loads(json.dumps(asdict(config)))  # plain values: tuples become lists
    data = fingerprint([*train_loader.paths, *(val_loader.paths if val_loader else [])])
    metadata = dict(tokenizer=tokenizer and tokenizer.merge_table, train_config=settings, data=data)
    step = checkpoints.resume(model, optimizer, scaler, metadata)
    dist.assert_same({**settings, **data, "step": step},
                     "start all ranks with the same flags, the same data and one log_dir that all of them see")
    log.start(step, config, settings, model, train_loader)
    train_model: Any = torch.compile(model) if config.compile else model  # evaluation and sampling use `model`
    if dist.world_size > 1:
        train_model = DistributedDataParallel(train_model)

    stopping = False
    while True:
        # Save first, so that a failing evaluation loses no training.
        finished = step >= config.max_steps or log.out_of_patience
        if step == 0 or is_due(config.save_every, step) or finished or stopping:
            with torch.no_grad(), autocast:
                next_loss = model(*train_loader.batch(step, 0))
            checkpoints.save(step, next_loss, must_succeed=step == 0 or finished or stopping)
        if stopping:
            log.print(f"stopped at step {step} of {config.max_steps}: rerun the same command to resume")
            dist.wait()  # torchrun ends the other ranks when one exits
            return 128 + (stop.signum or signal.SIGTERM)

        # Evaluate and sample, each once per step, also across restarts.
        with checkpoints.rescue(step):
            if val_loader and is_due(config.eval_every, step, finished) and not log.has("val", step):
                batches = map(val_loader.load_batch, log.progress_bar(val_loader.eval_batches(config.eval_tokens)))
                val_loss, bits_per_byte = evaluate_loss(model, batches, autocast, dist, tokenizer)
                checkpoints.assert_finite(step, f"validation loss {val_loss}", val_loss)
                if val_loss < log.best_loss:
                    checkpoints.save_best(step, val_loss)
                log.validation(step=step, loss=val_loss, bits_per_byte=bits_per_byte)
                if log.out_of_patience:
                    continue  # stop early: save this step and finish
            if tokenizer and is_due(config.sample_every, step, finished) and not log.has("samples", step):
                with autocast:
                    texts = generate_text(model, tokenizer, config.sample_prompts, config.sample_tokens,
                                          temperature=0.8, top_k=200, seed=config.seed)
                log.samples(step=step, texts=texts)
            if tokenizer and is_due(config.hellaswag_every, step, finished) and not log.has("hellaswag", step):
                result = hellaswag.evaluate_hellaswag(
                    model, tokenizer, examples, autocast, dist, config.micro_batch_size * int(config.seq_len),
                    show_bar=log.bar is not None, stopped=lambda: stop.signum > 0)
                if result is None:  # a signal on any rank
                    stopping = True
                    continue
                log.hellaswag(step=step, **result)
        if finished:
            log.print_end(step)
            dist.wait()
            return 0

        # One optimizer step: accumulate gradients over micro-steps, clip them, update the weights.
        t0 = time.perf_counter()
        train_loss = torch.zeros((), device=dist.device)
        for micro_step in range(train_loader.grad_accum_steps):
            x, y = train_loader.batch(0 if config.overfit_one_batch else step, micro_step)  # each (B, T)
            if model.config.dropout:
                seed_dropout(config.seed, step, micro_step, dist.rank)
            is_last_micro_step = micro_step == train_loader.grad_accum_steps - 1
            train_model.require_backward_grad_sync = is_last_micro_step  # DDP averages gradients once per step
            with autocast:
                loss = train_model(x, y) / train_loader.grad_accum_steps
            if is_last_micro_step:
                dist.wait()  # names a hung rank, which the all-reduce in backward cannot
            scaler.scale(loss).backward()
            train_loss += loss.detach()
        lr = get_lr(step, max_lr=config.max_lr, min_lr_ratio=config.min_lr_ratio, warmup_steps=config.warmup_steps,
                    max_steps=config.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        # Synchronize with the device, once per step.
        stats = torch.stack([train_loss, grad_norm, torch.tensor(float(stop.signum > 0), device=dist.device)])
        losses, grad_norms, stop_votes = zip(*dist.gather(stats), strict=True)
        stop.has_unsaved_steps = True  # from now on a signal waits for the end of a step
        checkpoints.check_update(step, losses, grad_norms[0])
        log.step(step=step, loss=sum(losses) / dist.world_size, lr=lr, grad_norm=grad_norms[0],
                 seconds=time.perf_counter() - t0)
        stopping = any(stop_votes)
        step += 1


def seed_dropout(*numbers: int) -> None:
    """Seed PyTorch with (seed, step, micro_step, rank), hashed so that nearby values give unrelated streams."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def is_due(every: int, step: int, finished: bool = False) -> bool:
    """Return whether an action with the interval `every` (steps; 0: never) is due after `step` steps, or at the end."""
    return every > 0 and step > 0 and (step % every == 0 or finished)


if __name__ == "__main__":
    run_cli(main, TrainConfig)
