"""A run's log: console lines or a progress bar, metrics.jsonl, samples.txt, TensorBoard, Weights & Biases."""

import importlib
import json
import math
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from gpt.dataloader import DataLoaderLite
from gpt.device import DTYPES
from gpt.diagnostics import diagnose
from gpt.distributed import Distributed
from gpt.errors import UserError
from gpt.files import atomic_write, read_metrics
from gpt.flops import flops_per_token, peak_flops
from gpt.model import GPT

SAMPLE_HEADER = re.compile(r"^--- sample at step (\d+) ---$", re.MULTILINE)


class RunLog:
    """Logs a run and keeps the records of its evaluations, which rank 0 reads from metrics.jsonl when a run resumes.

    All ranks call every method and hold the same evaluations; only rank 0 prints and writes. On a terminal, a progress
    bar replaces the step lines.
    """

    def __init__(self, config: Any, dist: Distributed):
        self.config, self.folder, self.dist = config, Path(config.log_dir), dist
        self.path, self.samples_path = self.folder / "metrics.jsonl", self.folder / "samples.txt"
        self.bar: tqdm | None = None
        self.size, self.pending_lines = 0, ""  # bytes in metrics.jsonl, and lines not written yet
        self.train: list[dict] = []  # the newest records of the split
        self.evaluations: list[dict] = []  # all of val, hellaswag and samples
        self.warned: set[str] = set()
        self.patience = 0
        self.writer: Any = None  # TensorBoard's
        self.wandb: Any = None

    def start(self, step: int, config: Any, settings: dict, model: GPT, train_loader: DataLoaderLite) -> None:
        """Open the log of a run at `step` and delete what a killed run logged after its last checkpoint.

        config: the resolved `scripts.train.TrainConfig`; settings: the same as plain values, for config.yaml. Raises
        UserError if TensorBoard or Weights & Biases is requested but cannot be used.
        """
        dist = self.dist
        self.config, self.first_step, self.patience = config, step, config.patience
        self.vocab_size = model.config.vocab_size
        self.epoch_tokens = train_loader.n_sequences * config.seq_len
        step_tokens = config.total_batch_size
        self.step_flops = step_tokens * flops_per_token(model.config, model.num_parameters(), config.seq_len)
        peak, source = peak_flops(dist.device, DTYPES[config.precision])
        self.peak_flops = peak * dist.world_size
        self.print(f"{model.num_parameters():,} parameters, {config.precision}, a step is "
                   f"{train_loader.grad_accum_steps} x {config.micro_batch_size} x {config.seq_len} tokens"
                   + (f" on each of {dist.world_size} ranks" if dist.world_size > 1 else "")
                   + f", peak {peak / 1e12:.3g} TFLOP/s for MFU ({source})")
        if dist.is_master:
            self._read(step)
            if step < config.max_steps and not self.out_of_patience:
                with atomic_write(self.folder / "config.yaml") as file:
                    file.write(yaml.safe_dump(settings, sort_keys=False).encode())
                self._start_trackers(step, settings)
                if sys.stderr.isatty():  # the bar goes to stderr, lines go to stdout
                    self.bar = tqdm(total=config.max_steps, initial=step, unit="step", dynamic_ncols=True)
        self.evaluations = dist.broadcast(self.evaluations)
        if config.compile and step < config.max_steps and not self.out_of_patience:
            self.print("compiling the model in the first step (takes a minute or more)")

    def _read(self, step: int) -> None:
        """Load the records of a run that resumes at `step` and delete later ones from metrics.jsonl and samples.txt."""
        records = read_metrics(self.path)
        kept = [r for r in records if r["step"] < step + (r["split"] != "train")]
        if kept != records or not self.path.exists() or not self.path.read_bytes().endswith(b"}\n"):
            with atomic_write(self.path) as file:
                file.write("".join(json.dumps(record) + "\n" for record in kept).encode())
        self.size = self.path.stat().st_size
        self.train = [record for record in kept if record["split"] == "train"]
        self.evaluations = [record for record in kept if record["split"] != "train"]
        if self.samples_path.exists():
            text = self.samples_path.read_text(encoding="utf-8", errors="replace")
            later = [match.start() for match in SAMPLE_HEADER.finditer(text) if int(match[1]) > step]
            if later:
                text = text[:later[0]]
                with atomic_write(self.samples_path) as file:
                    file.write(text.encode())
            self.evaluations += [{"split": "samples", "step": int(number)} for number in SAMPLE_HEADER.findall(text)]

    @property
    def val_losses(self) -> list[float]:
        """The validation losses so far, in nats per token."""
        return [record["loss"] for record in self.evaluations if record["split"] == "val"]

    @property
    def best_loss(self) -> float:
        """The lowest validation loss so far; infinity before the first validation."""
        return min(self.val_losses, default=math.inf)

    @property
    def out_of_patience(self) -> bool:
        """Whether the last `patience` validations had no new best loss; never if `patience` is 0."""
        losses = self.val_losses
        if not losses or not self.patience:
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= self.patience

    def has(self, split: str, step: int) -> bool:
        """Return whether `split` ("val", "hellaswag" or "samples") has been evaluated after `step` steps."""
        return any(record["split"] == split and record["step"] == step for record in self.evaluations)

    def print(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.dist.is_master:
            try:
                tqdm.write(text)
                sys.stdout.flush()
            except OSError:  # a full disk, a closed terminal: a lost line must not end the run
                pass

    def progress_bar(self, eval_batches: list) -> Iterable:
        """Return the batches of a validation, with a separate bar below the run's if there is one."""
        if self.bar is None:
            return eval_batches
        return tqdm(eval_batches, desc="validation", leave=False, dynamic_ncols=True)

    def step(self, *, step: int, loss: float, lr: float, grad_norm: float, seconds: float) -> None:
        """Log step number `step` (from 0), which took `seconds`; the loss is from before the update."""
        c = self.config
        tokens_per_s, mfu = c.total_batch_size / seconds, self.step_flops / seconds / self.peak_flops
        memory = {}
        if self.dist.device.type == "cuda":
            memory["peak_memory_gb"] = round(torch.cuda.max_memory_allocated(self.dist.device) / 1e9, 2)
        epoch = (step + 1) * c.total_batch_size / self.epoch_tokens
        self._append({"step": step, "split": "train", "loss": loss, "lr": lr,
                      "grad_norm": grad_norm if math.isfinite(grad_norm) else None,  # fp16: a skipped update
                      "tokens": (step + 1) * c.total_batch_size, "epoch": round(epoch, 4),
                      "tokens_per_s": round(tokens_per_s, 1), **memory})
        if self.bar is not None:
            val = f"val {self.val_losses[-1]:.4f}, " if self.val_losses else ""
            self.bar.set_postfix_str(f"loss {loss:.4f}, {val}{tokens_per_s:,.0f} tokens/s, {mfu:.0%} MFU", False)
            self.bar.update()
        is_due = step % c.log_every == 0 or step + 1 == c.max_steps
        if is_due and (self.bar is None or not sys.stdout.isatty()):
            self.print(f"step {step} | loss: {loss:.4f} | lr: {lr:.6f} | dt: {seconds * 1000:.0f}ms | grad norm: "
                       f"{grad_norm:.2f} | tokens/s: {tokens_per_s:,.0f} | mfu: {mfu:.0%} | epoch: {epoch:.2f}"
                       + "".join(f" | peak memory: {gb:.1f} GB" for gb in memory.values()))
        if self.dist.is_master:
            val_records = [record for record in self.evaluations if record["split"] == "val"]
            for name, message in diagnose(self.train, val_records, self.vocab_size, c.warmup_steps).items():
                if name not in self.warned:
                    self.warned.add(name)
                    self.print(f"warning: {message}")
        hours = seconds * (c.max_steps - step - 1) / 3600
        if step == self.first_step and self.dist.device.type == "cpu" and hours > 1:
            self.print(f"at {seconds:.2g} s per step this run takes about {hours:.0f} hours on this CPU: for a small "
                       f"model that trains in minutes, pass --config configs/laptop.yaml and a new --log_dir")

    def validation(self, *, step: int, loss: float, bits_per_byte: float | None) -> None:
        """Log the validation loss after `step` steps, in nats per token and, if known, in bits per byte."""
        perplexity = math.exp(min(loss, 700))  # beyond that a float overflows
        bpb_field = {} if bits_per_byte is None else {"bits_per_byte": bits_per_byte}
        self._append({"step": step, "split": "val", "loss": loss, "perplexity": perplexity, **bpb_field})
        self.print(f"val loss {loss:.4f} | step: {step} | perplexity: {perplexity:.1f}"
                   + "".join(f" | bits per byte: {bits:.4f}" for bits in bpb_field.values()))

    def hellaswag(self, *, step: int, **result: float) -> None:
        """Log the result of `gpt.hellaswag.evaluate_hellaswag` after `step` steps."""
        self._append({"step": step, "split": "hellaswag", **result})
        self.print(f"hellaswag acc {result['acc']:.4f} | step: {step} | acc_norm: {result['acc_norm']:.4f} | "
                   f"examples: {result['examples']}")

    def samples(self, *, step: int, texts: list[str]) -> None:
        """Print the samples generated after `step` steps and append them to samples.txt."""
        self.evaluations.append({"split": "samples", "step": step})
        if not self.dist.is_master:
            return
        formatted = "\n".join(f"--- sample at step {step} ---\n{text.strip()}\n---" for text in texts)
        self.print(formatted)
        try:
            with open(self.samples_path, "a", encoding="utf-8") as file:
                file.write(formatted + "\n\n")
        except OSError as error:
            self.print(f"warning: {self.samples_path} cannot be written ({error.strerror})")
        self._track(lambda writer: writer.add_text("samples", f"```\n{formatted}\n```", step))

    def print_end(self, step: int) -> None:
        """Print why a run stopped early, or that it was finished already."""
        if step < self.config.max_steps:
            self.print(f"finished at step {step} of {self.config.max_steps}: no better loss than {self.best_loss:.4f} "
                       f"in {self.patience} validations; raise --patience, or pass --patience 0, to continue")
        elif step == self.first_step:
            self.print(f"the run is finished, step {step} of {self.config.max_steps}; raise --max_steps (or "
                       f"--max_tokens, --max_epochs) to continue, or pass another --log_dir")

    def sync(self) -> None:
        """Sync metrics.jsonl to disk, so that no checkpoint is newer than its lines. Raises OSError on failure."""
        if self.dist.is_master:
            self._write(sync=True)

    def close(self) -> None:
        """Close the bar and the trackers."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        self._track(lambda writer: writer.close())
        if self.wandb:
            self.wandb.finish()

    def _start_trackers(self, step: int, settings: dict) -> None:
        """Open TensorBoard's writer and, if set, a Weights & Biases run that copies everything from it."""
        if not (self.config.tensorboard or self.config.wandb_project):
            return
        tensorboard = import_or_error("torch.utils.tensorboard", "tensorboard")
        if self.config.wandb_project:
            wandb = import_or_error("wandb", "wandb")
            id_file = self.folder / "wandb_run.txt"  # a resumed run keeps its W&B run
            if step == 0 or not id_file.exists():
                with atomic_write(id_file) as file:
                    file.write(uuid.uuid4().hex.encode())
            try:
                self.wandb = wandb.init(project=self.config.wandb_project, name=self.folder.name, dir=self.folder,
                                        id=id_file.read_text(), resume="allow", config=settings, sync_tensorboard=True)
            except wandb.Error as error:
                raise UserError(f"wandb_project {self.config.wandb_project!r}: {error}") from None
        self.writer = tensorboard.SummaryWriter(self.folder, purge_step=step + 1)  # drops later events
        text = f"```\n{yaml.safe_dump(settings, sort_keys=False)}```"
        self._track(lambda writer: writer.add_text("settings", text, step))

    def _track(self, send: Callable[[Any], Any]) -> None:
        """Call `send` with the trackers' writer; if that fails, for example on a full disk, stop tracking."""
        if self.writer:
            try:
                send(self.writer)
            except Exception as error:  # no failure of a tracker may end the run
                self.writer = None
                self.print(f"warning: TensorBoard or Weights & Biases failed ({error}): the run continues without them")

    def _append(self, record: dict) -> None:
        (self.train if record["split"] == "train" else self.evaluations).append(record)
        del self.train[:-1000]
        if not self.dist.is_master:
            return
        already_pending, self.pending_lines = self.pending_lines, self.pending_lines + json.dumps(record) + "\n"
        try:
            self._write()
        except OSError as error:
            if not already_pending:
                self.print(f"warning: {self.path} cannot be written ({error.strerror}): lines are kept and retried")
        scalars = {f"{record['split']}/{name}": value for name, value in record.items()
                   if name not in ("step", "split") and value is not None}
        self._track(lambda writer: [writer.add_scalar(name, value, record["step"]) for name, value in scalars.items()])

    def _write(self, sync: bool = False) -> None:
        with open(self.path, "ab") as file:  # opened each time: a killed process loses no line
            file.truncate(min(self.size, file.tell()))  # drops a partial line left by a full disk
            file.write(self.pending_lines.encode())
            file.flush()
            if sync:
                os.fsync(file.fileno())
            self.size, self.pending_lines = file.tell(), ""


def import_or_error(module: str, package: str) -> Any:
    """Import a module of an optional package. Raises UserError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{package} is not installed ({error}): pip install {package}") from None
