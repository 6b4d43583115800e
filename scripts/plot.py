"""Plot runs: python -m scripts.plot log/ [other_run/ ...] [--x steps|tokens|time]"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from cycler import cycler
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from tyro.conf import Positional

from gpt.errors import UserError
from gpt.files import atomic_write, read_metrics
from scripts.cli import run_cli

# Colours that colour-blind readers can tell apart: Okabe and Ito (2008), without yellow,
# which is too pale for lines.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
STYLES = cycler(linestyle=["-", "--", ":"]) * cycler(color=COLOURS)
RC_PARAMS = {"axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
             "axes.spines.right": False, "axes.titlelocation": "left", "legend.fontsize": 9,
             "legend.frameon": False, "legend.handlelength": 4, "text.parse_math": False,
             "figure.constrained_layout.w_pad": 0.1, "figure.constrained_layout.h_pad": 0.08}
TITLES = {"loss": "loss (nats per token): training (pale), moving average (thick), "
                  "validation (●), lowest (★)",
          "bits_per_byte": "validation loss in bits per byte (the runs have different tokenizers): "
                           "lowest (★)",
          "lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_s": "tokens per second",
          "acc_norm": "HellaSwag acc_norm"}
GPT2_ACC_NORM = 0.2955  # see gpt/hellaswag.py
SUFFIXES = (".png", ".jpg", ".pdf", ".svg")
SMOOTHING_FRACTION = 0.04  # window of the moving average, as a fraction of the run


@dataclass
class PlotConfig:
    """Settings of scripts.plot."""

    runs: Positional[list[str]] = field(default_factory=lambda: ["log"])  # log_dirs of runs
    x: Literal["steps", "tokens", "time"] = "steps"  # x axis; time: minutes of training alone
    out: str | None = None  # image file; default: plot.png in the first run


@dataclass
class Run:
    """The records of a run's metrics.jsonl, by split."""

    name: str
    records: dict[str, list[dict]]

    def curve(self, split: str, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps and the values, (N,) each, of the records with this key."""
        records = [record for record in self.records.get(split, [])
                   if record.get(key) is not None]
        steps = np.array([record["step"] for record in records], dtype=int)
        return steps, np.array([record[key] for record in records], dtype=float)

    def x(self, steps: np.ndarray, unit: str) -> np.ndarray:
        """Return the positions on the x axis of the model after `steps` steps."""
        if unit == "steps":
            return steps
        train_steps, x = self.curve("train", "tokens")
        if unit == "time":
            tokens_per_s = self.curve("train", "tokens_per_s")[1]
            x = np.cumsum(np.diff(x, prepend=0) / tokens_per_s) / 60
        return np.interp(steps, [0, *(train_steps + 1)], [0, *x])

    def bytes_per_token(self) -> float:
        """Return the mean length of a validation token; 0 if it is unknown."""
        for record in self.records.get("val", []):
            if record.get("bits_per_byte"):
                return record["loss"] / math.log(2) / record["bits_per_byte"]
        return 0.0

    def best(self, loss: str) -> str:
        """Return the lowest value of "loss" or "bits_per_byte" and its step, as text."""
        steps, losses = self.curve("val", loss)
        if not len(steps):
            return "no validation loss"
        unit = " bits per byte" if loss == "bits_per_byte" else ""
        return f"best val loss {losses.min():.4f}{unit} at step {steps[losses.argmin()]:,}"


def main(config: PlotConfig) -> None:
    """Plot the runs, and print the path of the image and the best validation loss of each run."""
    runs = [read_run(path) for path in config.runs]
    out = Path(config.out or f"{runs[0].name}/plot.png")
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {out} has an unknown extension: expected {', '.join(SUFFIXES)}")
    loss = comparable_loss(runs)
    figure = plot_runs(runs, config.x, loss)
    with atomic_write(out) as file:
        figure.savefig(file, format=out.suffix[1:].lower())
    print(" | ".join([str(out), *(f"{run.name}: {run.best(loss)}" for run in runs)]))


def read_run(path: str) -> Run:
    """Return the run in a folder, or of a metrics.jsonl, as far as it has been written.

    Raises UserError if it has no losses.
    """
    file = Path(path) if path.endswith(".jsonl") else Path(path) / "metrics.jsonl"
    records: dict[str, list[dict]] = {}
    for record in read_metrics(file):
        records.setdefault(record["split"], []).append(record)
    if not records.keys() & {"train", "val"}:
        raise UserError(f"no losses in {file}: pass the log_dir of a run (python -m scripts.train)")
    return Run(str(file.parent), records)


def comparable_loss(runs: list[Run]) -> str:
    """Return "bits_per_byte" if the runs have different tokenizers, else "loss"."""
    lengths = [run.bytes_per_token() for run in runs]
    is_different = min(lengths) > 0 and max(lengths) > 1.001 * min(lengths)
    return "bits_per_byte" if is_different else "loss"


def plot_runs(runs: list[Run], unit: str, loss: str) -> Figure:
    """Return a figure of the runs over "steps", "tokens" or "time", with `comparable_loss`."""
    rcParams.update(RC_PARAMS)  # type: ignore[arg-type]
    figure = Figure(figsize=(10, 7 + 0.2 * len(runs)), dpi=160, layout="constrained")
    small = ["lr", "grad_norm", "tokens_per_s"]
    if any("hellaswag" in run.records for run in runs):
        small.append("acc_norm")
    layout: Any = [[loss] * len(small), small]
    panels = figure.subplot_mosaic(layout, height_ratios=[2, 1])
    for run, style in zip(runs, STYLES(), strict=False):  # STYLES() never ends
        plot_run(panels, run, unit, loss, style, len(runs))
    for key, panel in panels.items():
        panel.set_title(TITLES[key])
        panel.xaxis.set_major_formatter("{x:g}" if unit == "time" else EngFormatter(sep=""))  # 20k
        panel.yaxis.set_major_formatter("{x:,.10g}")  # 0.0006 and 20,000
        # Without the first steps, whose losses are far larger, and rare spikes.
        curves = [run.curve(split, key)[1] for run in runs for split in ("train", "val")]
        late = np.concatenate([values[len(values) // 20:] for values in curves])
        if len(late):
            low, high = np.percentile(late, [0.5, 99.5])
            margin = 0.1 * (high - low) + 0.01 * high
            panel.set_ylim(low - margin if key == loss else 0, high + margin)
    if "acc_norm" in panels:
        panels["acc_norm"].axhline(GPT2_ACC_NORM, color="grey")
        panels["acc_norm"].annotate("OpenAI's 124M", (0, GPT2_ACC_NORM), (2, 2), color="grey",
                                    xycoords=("axes fraction", "data"), fontsize=8,
                                    textcoords="offset points")
    figure.supxlabel("minutes" if unit == "time" else unit, fontsize="medium")
    figure.legend(loc="outside upper left")
    return figure


def plot_run(panels: dict[str, Any], run: Run, unit: str, loss: str, style: dict[str, Any],
             n_runs: int) -> None:
    """Draw one of `n_runs` runs into the panels."""
    for key, panel in panels.items():
        if key in ("bits_per_byte", "acc_norm"):  # not of training
            continue
        steps, values = run.curve("train", key)
        x = run.x(steps, unit)
        if key != "lr":
            panel.plot(x, values, color=style["color"], linewidth=0.5, alpha=0.35 / n_runs ** 0.5)
            x, values = moving_average(x), moving_average(values)
        panel.plot(x, values, marker="." if len(x) == 1 else "", **style)
    dots = dict(linewidth=1, marker="o", markeredgecolor="white", **style)
    if "acc_norm" in panels:
        steps, values = run.curve("hellaswag", "acc_norm")
        panels["acc_norm"].plot(run.x(steps, unit), values, **dots)
    steps, values = run.curve("val", loss)
    x = run.x(steps, unit)
    # Not "_…": Matplotlib leaves out such labels.
    panels[loss].plot(x, values, label=f" {run.name}: {run.best(loss)}",
                     markevery=len(x) // 30 + 1, **dots)
    if len(x):
        best = x[values.argmin()], values.min()
        panels[loss].plot(*best, marker="*", markersize=16, markeredgecolor="white",
                         color=style["color"], zorder=3)
        if n_runs == 1:  # the values of several runs could overlap: only the legend has them
            panels[loss].annotate(f"{values.min():.4f}", best, (0, 10), textcoords="offset points",
                                 ha="center")


def moving_average(y: np.ndarray) -> np.ndarray:
    """Return the centred moving average of y, (N,), without the ends,
    where the window is not full."""
    window = 2 * round(len(y) * SMOOTHING_FRACTION / 2) + 1
    return np.convolve(y, np.ones(window) / window, "valid") if len(y) else y


if __name__ == "__main__":
    run_cli(main, PlotConfig)
