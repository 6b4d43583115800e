"""A run's log: console lines, a progress bar on a terminal, metrics.jsonl, samples.txt, and TensorBoard or
Weights & Biases if they are asked for."""

import json
import math
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

from gpt.atomic import atomic_write
from gpt.dashboards import Dashboards
from gpt.red_flags import red_flags


class RunLog:
    """Writes what happens in a run; on ranks other than 0 (`enabled` false) every method does nothing.

    On a terminal a bar shows the newest losses, tokens per second and the time left; elsewhere steps are lines.
    Raises UserError where TensorBoard or Weights & Biases are asked for and not installed.
    """

    def __init__(self, log_dir: str | Path, enabled: bool, tensorboard: bool = False, wandb_project: str | None = None):
        self.folder, self.enabled = Path(log_dir), enabled
        self.path, self.samples_path = self.folder / "metrics.jsonl", self.folder / "samples.txt"
        self.bar: tqdm | None = None
        self.size, self.unwritten = 0, ""  # bytes in metrics.jsonl, and lines that a full disk has not taken
        self.train: list[dict] = []  # the newest records of the split
        self.val: list[dict] = []  # all
        self.warned: set[str] = set()
        self.dashboards = Dashboards(self.folder, enabled and tensorboard, wandb_project if enabled else None,
                                     self.print)

    def start(self, step: int, settings: dict, evaluated: bool = True) -> tuple[float, int]:
        """Open the log of a run with these settings at `step`.

        What a killed run had logged beyond its last checkpoint is dropped: it is about to happen again, and so are the
        evaluations after `step` updates unless that model has been `evaluated`.

        Returns the lowest validation loss so far, infinity in a new run, and how many validations came after it.
        """
        if not self.enabled:
            return math.inf, 0
        records = [r for r in read_metrics(self.path) if r["step"] < step + (evaluated and r["split"] != "train")]
        with atomic_write(self.path) as file:
            file.write("".join(json.dumps(record) + "\n" for record in records).encode())
        self.size = self.path.stat().st_size
        if self.samples_path.exists():
            text = self.samples_path.read_text(encoding="utf-8", errors="replace")
            later = (match.start() for match in re.finditer(r"^--- sample at step (\d+) ---$", text, re.MULTILINE)
                     if int(match[1]) >= step + evaluated)
            if (end := next(later, None)) is not None:
                with atomic_write(self.samples_path) as file:
                    file.write(text[:end].encode())
        self.train, self.val = ([r for r in records if r["split"] == split] for split in ("train", "val"))
        self.dashboards.start(step, step + evaluated, settings)
        if sys.stderr.isatty():  # where the bar is drawn; lines go to standard output
            self.bar = tqdm(total=settings["max_steps"], initial=step, unit="step", dynamic_ncols=True)
        losses = [record["loss"] for record in self.val]
        best = min(losses, default=math.inf)
        return best, len(losses) - 1 - losses.index(best) if losses else 0

    def print(self, text: str) -> None:
        """A line on the console, above the bar if there is one."""
        if self.enabled:
            try:
                tqdm.write(text)
                sys.stdout.flush()
            except OSError:  # a full disk, a terminal that is gone: a lost line must not end the run
                pass

    def progress(self, what: str, items: list) -> Iterable:
        """The items, with a bar of their own below that of the run while one goes through them."""
        return tqdm(items, desc=what, leave=False, dynamic_ncols=True) if self.bar is not None else items

    def step(self, *, step: int, loss: float, lr: float, grad_norm: float, seconds: float, mfu: float,
             batch_tokens: int, epoch: float, line: bool, peak_memory: int = 0) -> None:
        """Log the update with index `step`, of `batch_tokens` tokens: the loss is the one before the update, mfu the
        fraction of the device's peak that it reached (`gpt.flops`), epoch how often training has been through its data
        after it, peak_memory the most GPU memory that tensors have taken, in bytes, 0 on a CPU."""
        if not self.enabled:
            return
        tokens_per_s = batch_tokens / seconds
        memory = {"peak_memory_gb": round(peak_memory / 1e9, 2)} if peak_memory else {}
        self._append({"step": step, "split": "train", "loss": loss, "lr": lr,
                      "grad_norm": grad_norm if math.isfinite(grad_norm) else None,  # fp16: a step that was skipped
                      "tokens": (step + 1) * batch_tokens, "epoch": round(epoch, 4),
                      "tokens_per_s": round(tokens_per_s, 1), **memory})
        if self.bar is not None:
            val = f"val {self.val[-1]['loss']:.4f}, " if self.val else ""
            self.bar.set_postfix_str(f"loss {loss:.4f}, {val}{tokens_per_s:,.0f} tokens/s, {mfu:.0%} MFU", False)
            self.bar.update()
        if line and (self.bar is None or not sys.stdout.isatty()):
            self.print(f"step {step} | loss: {loss:.4f} | lr: {lr:.6f} | dt: {seconds * 1000:.0f}ms | grad norm: "
                       f"{grad_norm:.2f} | tokens/s: {tokens_per_s:,.0f} | mfu: {mfu:.0%} | epoch: {epoch:.2f}"
                       + "".join(f" | peak memory: {gb:.1f} GB" for gb in memory.values()))

    def samples(self, *, step: int, texts: list[str]) -> None:
        """Show what the model writes after `step` updates, and keep it in samples.txt."""
        if not self.enabled:
            return
        shown = "\n".join(f"--- sample at step {step} ---\n{text.strip()}\n---" for text in texts)
        self.print(shown)
        try:
            with open(self.samples_path, "a", encoding="utf-8") as file:
                file.write(shown + "\n\n")
        except OSError as error:
            self.print(f"warning: {self.samples_path} cannot be written ({error.strerror})")
        self.dashboards.text("samples", shown, step)

    def warn(self, vocab_size: int, warmup_steps: int) -> None:
        """Say what looks wrong (`gpt.red_flags`), each thing once."""
        for name, words in red_flags(self.train, self.val, vocab_size, warmup_steps).items():
            if name not in self.warned:
                self.warned.add(name)
                self.print(f"warning: {words}")

    def validation(self, *, step: int, loss: float, bits_per_byte: float | None) -> None:
        """Log the validation loss, in nats per token, of the model after `step` updates, and in bits per byte of text
        where that is known."""
        if self.enabled:
            perplexity = math.exp(min(loss, 700))  # beyond that a float overflows
            known = {} if bits_per_byte is None else {"bits_per_byte": bits_per_byte}
            self._append({"step": step, "split": "val", "loss": loss, "perplexity": perplexity, **known})
            self.print(f"val loss {loss:.4f} | step: {step} | perplexity: {perplexity:.1f}"
                       + "".join(f" | bits per byte: {bits:.4f}" for bits in known.values()))

    def hellaswag(self, *, step: int, **result: float) -> None:
        """Log what `gpt.hellaswag.evaluate` found for the model after `step` updates."""
        if self.enabled:
            self._append({"step": step, "split": "hellaswag", **result})
            self.print(f"hellaswag acc {result['acc']:.4f} | step: {step} | acc_norm: {result['acc_norm']:.4f} | "
                       f"examples: {result['examples']}")

    def sync(self) -> None:
        """Force metrics.jsonl to disk: a checkpoint must not outlive the lines before it. Raises OSError."""
        if self.enabled:
            self._write(sync=True)

    def close(self) -> None:
        """Leave the bar as it stands, and let the dashboards finish."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        self.dashboards.close()

    def _append(self, record: dict) -> None:
        if record["split"] != "hellaswag":
            (self.train if record["split"] == "train" else self.val).append(record)
            del self.train[:-1000]
        before, self.unwritten = self.unwritten, self.unwritten + json.dumps(record) + "\n"
        try:
            self._write()
        except OSError as error:
            if not before:
                self.print(f"warning: {self.path} cannot be written ({error.strerror}); its lines are kept for later")
        self.dashboards.scalars(record)

    def _write(self, sync: bool = False) -> None:
        with open(self.path, "ab") as file:  # opened each time: a killed process loses no line
            file.truncate(min(self.size, file.tell()))  # without half a line that a full disk took
            file.write(self.unwritten.encode())
            file.flush()
            if sync:
                os.fsync(file.fileno())
            self.size, self.unwritten = file.tell(), ""


def read_metrics(path: str | Path) -> list[dict]:
    """The records of a metrics.jsonl, without lines that are broken (a killed run's last one)."""
    records = []
    lines = Path(path).read_text(errors="replace").splitlines() if Path(path).exists() else []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "split" in record and all(isinstance(record.get(key), int | float) for key in (
                "step", "acc" if record["split"] == "hellaswag" else "loss")):
            records.append(record)
    return records
