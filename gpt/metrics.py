"""A run's log: console lines or a progress bar, metrics.jsonl, samples.txt, TensorBoard, W&B."""

import json
import math
import os
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from gpt.diagnostics import diagnose
from gpt.distributed import Ranks
from gpt.errors import UserError
from gpt.files import atomic_write, parse_record

MAX_TRAIN_RECORDS = 1000  # kept in memory for gpt/diagnostics.py, which reads no more


@dataclass
class RunLog:
    """Logs a run and remembers what has been evaluated: a resumed run reads it from metrics.jsonl.

    All ranks call every method and hold the same evaluations; only rank 0 prints, reads and writes.
    On a terminal, a progress bar replaces the step lines.
    """

    folder: Path
    ranks: Ranks
    assert_lock_held: Callable[[], None]  # see `gpt.files.run_lock`
    start_step: int
    max_steps: int
    log_every: int
    patience: int
    warmup_steps: int
    vocab_size: int
    step_tokens: int
    epoch_tokens: int
    peak_seconds: float  # duration of a step at the peak FLOP/s of all devices

    def __post_init__(self) -> None:
        self.path = self.folder / "metrics.jsonl"
        self.train_records: list[dict] = []  # the newest
        self.evaluations: list[dict] = []  # all records of val, samples, hellaswag and start
        self.warned: set[str] = set()
        self.line_break = ""  # ends a partly written line
        self.bar: tqdm | None = None
        self.writer: Any = None  # TensorBoard's
        self.wandb: Any = None
        if self.ranks.is_master and self.path.exists():
            self._read_records()
        self.evaluations = self.ranks.broadcast(self.evaluations)

    def _read_records(self) -> None:
        """Read metrics.jsonl up to `start_step` and cut off what a killed run has logged later."""
        end = 0
        with open(self.path, "rb") as file:
            for line in file:  # one at a time: the file can be long
                record = parse_record(line)
                if record is None:
                    continue
                # Step numbers count from 0; an evaluation has the number of finished steps.
                if record["step"] >= self.start_step + (record["split"] != "train"):
                    break
                self._remember(record)
                end = file.tell()
                self.line_break = "" if line.endswith(b"\n") else "\n"
        if end < self.path.stat().st_size:
            os.truncate(self.path, end)

    def _remember(self, record: dict) -> None:
        if record["split"] == "train":
            self.train_records.append(record)
            del self.train_records[:-MAX_TRAIN_RECORDS]
        else:
            self.evaluations.append(record)

    def _records(self, split: str) -> list[dict]:
        return [record for record in self.evaluations if record["split"] == split]

    def is_due(self, split: str, every: int, step: int, finished: bool) -> bool:
        """Return whether to evaluate `split` ("val", "samples" or "hellaswag") after `step` steps:
        every `every` steps (0: never) and when the run is finished, unless it is logged already."""
        is_time = every > 0 and step > 0 and (step % every == 0 or finished)
        return is_time and all(record["step"] != step for record in self._records(split))

    @property
    def best_loss(self) -> float:
        """The lowest validation loss so far, in nats per token; infinity before the first one."""
        return min((record["loss"] for record in self._records("val")), default=math.inf)

    @property
    def should_stop_early(self) -> bool:
        """Whether the last `patience` validations had no new best loss; never if it is 0."""
        if not self.patience:
            return False
        losses = [record["loss"] for record in self._records("val")]
        if not losses:
            return False
        return len(losses) - 1 - losses.index(min(losses)) >= self.patience

    def log_start(self, train_config: dict, **environment: Any) -> None:
        """Write config.yaml, record where the run starts or resumes, and show the progress bar.

        train_config: the settings as plain values. environment: commit, PyTorch version, device
        and number of ranks.
        """
        if self.ranks.is_master:
            with atomic_write(self.folder / "config.yaml") as file:
                file.write(yaml.safe_dump(train_config, sort_keys=False).encode())
            # The bar goes to stderr, lines go to stdout. Some terminals have 0 columns.
            if sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns:
                self.bar = tqdm(total=self.max_steps, initial=self.start_step, unit="step",
                                dynamic_ncols=True)
        self._append("start", self.start_step, environment)

    def log_step(self, step: int, loss: float, lr: float, grad_norm: float,
                 seconds: float) -> None:
        """Log step number `step` (from 0), which took `seconds`; the loss is from before its
        update."""
        tokens = (step + 1) * self.step_tokens
        epoch = tokens / self.epoch_tokens
        tokens_per_s = self.step_tokens / seconds
        mfu = self.peak_seconds / seconds
        record = {"loss": loss, "lr": lr,
                  "grad_norm": grad_norm if math.isfinite(grad_norm) else None,  # a skipped update
                  "tokens": tokens, "epoch": round(epoch, 4),
                  "tokens_per_s": round(tokens_per_s, 1)}
        memory = ""
        if self.ranks.device.type == "cuda":
            gigabytes = torch.cuda.max_memory_allocated(self.ranks.device) / 1e9
            record["peak_memory_gb"] = round(gigabytes, 2)
            memory = f" | peak memory: {gigabytes:.1f} GB"
        self._append("train", step, record)
        if self.bar is not None:
            val = "".join(f"val {record['loss']:.4f}, " for record in self._records("val")[-1:])
            self.bar.set_postfix_str(f"loss {loss:.4f}, {val}{tokens_per_s:,.0f} tokens/s, "
                                     f"{mfu:.0%} MFU", refresh=False)
            self.bar.update()
        is_due = step % max(self.log_every, 1) == 0 or step + 1 == self.max_steps
        if is_due and (self.bar is None or not sys.stdout.isatty()):
            self.ranks.print(f"step {step} | loss: {loss:.4f} | lr: {lr:.6f} | dt: "
                             f"{seconds * 1000:.0f}ms | grad norm: {grad_norm:.2f} | tokens/s: "
                             f"{tokens_per_s:,.0f} | mfu: {mfu:.0%} | epoch: {epoch:.2f}{memory}")
        issues = diagnose(self.train_records, self._records("val"), self.vocab_size,
                          self.warmup_steps)
        for name, message in issues.items():
            self._warn_once(name, message)

    def log_validation(self, step: int, loss: float, bits_per_byte: float | None) -> None:
        """Log the validation loss after `step` steps, in nats per token and, if known, in bits per
        byte."""
        record = {"loss": loss, "perplexity": math.exp(min(loss, 700))}  # beyond: overflow
        bits = ""
        if bits_per_byte is not None:
            record["bits_per_byte"] = bits_per_byte
            bits = f" | bits per byte: {bits_per_byte:.4f}"
        self._append("val", step, record)
        self.ranks.print(f"val loss {loss:.4f} | step: {step} | perplexity: "
                         f"{record['perplexity']:.1f}{bits}")

    def log_hellaswag(self, step: int, result: dict[str, float]) -> None:
        """Log the result of `gpt.hellaswag.evaluate_hellaswag` after `step` steps."""
        self._append("hellaswag", step, result)
        self.ranks.print(f"hellaswag acc {result['acc']:.4f} | step: {step} | acc_norm: "
                         f"{result['acc_norm']:.4f} | examples: {result['examples']}")

    def log_samples(self, step: int, texts: list[str]) -> None:
        """Print the samples generated after `step` steps and add them to samples.txt."""
        self._append("samples", step, {"texts": texts})
        if not self.ranks.is_master:
            return
        pages = []
        for record in self._records("samples"):
            header = f"--- sample at step {record['step']} ---"
            pages.append("\n".join(f"{header}\n{text.strip()}\n---" for text in record["texts"]))
        self.ranks.print(pages[-1])
        try:
            with atomic_write(self.folder / "samples.txt") as file:
                file.write(("\n\n".join(pages) + "\n").encode(errors="replace"))
        except OSError as error:
            self._warn_once("samples", f"samples.txt cannot be written ({error.strerror})")
        self._track(lambda writer: writer.add_text("samples", f"```\n{pages[-1]}\n```", step))

    def print_end(self, step: int, stopping: bool) -> None:
        """Print why the run ends at `step`, unless it is at its last step."""
        if stopping:
            self.ranks.print(f"stopped at step {step} of {self.max_steps}: rerun the same command "
                             f"to resume")
        elif step < self.max_steps:
            self.ranks.print(f"finished at step {step} of {self.max_steps}: no better loss than "
                             f"{self.best_loss:.4f} in {self.patience} validations; raise "
                             f"--patience, or pass --patience 0, to continue")
        elif step == self.start_step:
            self.ranks.print(f"the run is finished, step {step} of {self.max_steps}; raise "
                             f"--max_steps (or --max_tokens, --max_epochs) to continue, or pass "
                             f"another --log_dir")

    def open_trackers(self, wandb_project: str | None, train_config: dict) -> None:
        """Open TensorBoard's writer and, if set, a Weights & Biases run that copies its data.

        Raises UserError if wandb is not installed or refuses the project.
        """
        if not self.ranks.is_master:
            return
        from torch.utils import tensorboard  # takes a second

        if wandb_project:
            try:
                import wandb
            except ImportError as error:
                raise UserError(f"--wandb_project needs wandb ({error}): pip install wandb"
                                ) from None
            id_file = self.folder / "wandb_run.txt"  # a resumed run keeps its W&B run
            if self.start_step == 0 or not id_file.exists():
                id_file.write_text(uuid.uuid4().hex)
            try:
                self.wandb = wandb.init(project=wandb_project, name=self.folder.name,
                                        dir=self.folder, id=id_file.read_text(), resume="allow",
                                        config=train_config, sync_tensorboard=True)
            except wandb.Error as error:
                raise UserError(f"wandb_project {wandb_project!r}: {error}") from None
        # Drops events that a killed run logged after the checkpoint.
        self.writer = tensorboard.SummaryWriter(self.folder, purge_step=self.start_step + 1)
        settings = f"```\n{yaml.safe_dump(train_config, sort_keys=False)}```"
        self._track(lambda writer: writer.add_text("settings", settings, self.start_step))

    def close(self) -> None:
        """Close the bar and the trackers."""
        if self.bar is not None:
            self.bar.close()
        self._track(lambda writer: writer.close())
        if self.wandb:
            self._track(lambda _: self.wandb.finish())

    def _append(self, split: str, step: int, values: dict) -> None:
        """Remember a record and write it to metrics.jsonl and the trackers."""
        record = {"step": step, "split": split, **values}
        self._remember(record)
        if not self.ranks.is_master:
            return
        try:
            self.assert_lock_held()
            with open(self.path, "a") as file:  # opened each time: a killed process loses no line
                file.write(self.line_break + json.dumps(record) + "\n")
            self.line_break = ""
        except OSError as error:
            self.line_break = "\n"
            self._warn_once("metrics", f"{self.path} cannot be written ({error.strerror}): this "
                                       f"step is not logged")
        scalars = {f"{split}/{name}": value for name, value in values.items()
                   if isinstance(value, int | float)}
        self._track(lambda writer: [writer.add_scalar(name, value, step)
                                    for name, value in scalars.items()])

    def _warn_once(self, name: str, message: str) -> None:
        if name not in self.warned:
            self.warned.add(name)
            self.ranks.print(f"warning: {message}")

    def _track(self, send: Callable[[Any], Any]) -> None:
        """Call `send` with TensorBoard's writer; if that fails, stop tracking."""
        if self.writer:
            try:
                send(self.writer)
            except Exception as error:  # a failing tracker must not end the run
                self.writer = None
                self.ranks.print(f"warning: TensorBoard or Weights & Biases failed ({error}): the "
                                 f"run continues without them")
