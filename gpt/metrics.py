"""A run's log: console lines, a progress bar on a terminal, and metrics.jsonl."""

import json
import math
import os
import sys
from pathlib import Path

from tqdm import tqdm

from gpt.atomic import atomic_write


class RunLog:
    """Writes what happens in a run; on ranks other than 0 (`enabled` false) every method does nothing.

    On a terminal a bar shows the newest loss, tokens per second and the time left; elsewhere steps are lines.
    """

    def __init__(self, log_dir: str | Path, enabled: bool):
        self.path, self.enabled = Path(log_dir) / "metrics.jsonl", enabled
        self.bar: tqdm | None = None
        self.size, self.unwritten = 0, ""  # bytes in metrics.jsonl, and lines that a full disk has not taken

    def start(self, step: int, max_steps: int, evaluated: bool = True) -> float:
        """Open the log at `step`; the lowest validation loss so far, infinity in a new run.

        What a killed run had logged beyond its last checkpoint is dropped: it is about to happen again, and so are the
        evaluations after `step` updates unless that model has been `evaluated`.
        """
        best = float("inf")
        if not self.enabled:
            return best
        records = [r for r in read_metrics(self.path) if r["step"] < step + (evaluated and r["split"] != "train")]
        with atomic_write(self.path) as file:
            file.write("".join(json.dumps(record) + "\n" for record in records).encode())
        self.size = self.path.stat().st_size
        if sys.stderr.isatty():  # where the bar is drawn; lines go to standard output
            self.bar = tqdm(total=max_steps, initial=step, unit="step", dynamic_ncols=True)
        return min((r["loss"] for r in records if r["split"] == "val"), default=best)

    def print(self, text: str) -> None:
        """A line on the console, above the bar if there is one."""
        if self.enabled:
            try:
                tqdm.write(text)
                sys.stdout.flush()
            except OSError:  # a full disk, a terminal that is gone: a lost line must not end the run
                pass

    def step(self, *, step: int, loss: float, lr: float, grad_norm: float, seconds: float, mfu: float,
             batch_tokens: int, line: bool) -> None:
        """Log the update with index `step`, of `batch_tokens` tokens: the loss is the one before the update, mfu the
        share of the device's speed in matrix products that it reached (`gpt.flops`)."""
        if not self.enabled:
            return
        tokens_per_s = batch_tokens / seconds
        self._append({"step": step, "split": "train", "loss": loss, "lr": lr,
                      "grad_norm": grad_norm if math.isfinite(grad_norm) else None,  # fp16: a step that was skipped
                      "tokens": (step + 1) * batch_tokens, "tokens_per_s": round(tokens_per_s, 1)})
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {loss:.4f}, {tokens_per_s:,.0f} tokens/s, {mfu:.0%} MFU", refresh=False)
            self.bar.update()
        if line and (self.bar is None or not sys.stdout.isatty()):
            self.print(f"step {step} | loss: {loss:.4f} | lr: {lr:.6f} | dt: {seconds * 1000:.0f}ms | "
                       f"grad norm: {grad_norm:.2f} | tokens/s: {tokens_per_s:,.0f} | mfu: {mfu:.0%}")

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
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _append(self, record: dict) -> None:
        before, self.unwritten = self.unwritten, self.unwritten + json.dumps(record) + "\n"
        try:
            self._write()
        except OSError as error:
            if not before:
                self.print(f"warning: {self.path} cannot be written ({error.strerror}); its lines are kept for later")

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
