"""Plot runs: python -m scripts.plot log/ [other_run/ ...] [--x steps|tokens] [--out FILE.png]"""

import textwrap
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
from scripts.cli import read_yaml, run_cli

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
          "lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_s": "tokens per second"}
SUFFIXES = (".png", ".jpg", ".pdf", ".svg")
SMOOTHING_FRACTION = 0.04  # window of the moving average, as a fraction of the run
SKIP_FRACTION = 0.05  # first fraction of the run, which the axis limits ignore


@dataclass
class PlotConfig:
    """Settings of scripts.plot."""

    runs: Positional[list[str]] = field(default_factory=lambda: ["log"])  # run folders (log_dir)
    x: Literal["steps", "tokens"] = "steps"  # unit of the x axis
    out: str | None = None  # image file; unset: plot.png in the first run


@dataclass
class Run:
    """The records of a run's metrics.jsonl and the settings of its config.yaml."""

    name: str
    train: list[dict]
    val: list[dict]
    settings: dict[str, Any]

    def best(self) -> str:
        """Return the lowest validation loss and its step, as text."""
        if not self.val:
            return "no validation loss"
        record = min(self.val, key=lambda record: record["loss"])
        return f"best val loss {record['loss']:.4f} at step {record['step']:,}"


def main(config: PlotConfig) -> None:
    """Plot the runs, and print the path of the image and the best validation loss of each run."""
    runs = [read_run(Path(folder)) for folder in config.runs]
    out = Path(config.out or f"{runs[0].name}/plot.png")
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {out} has an unknown extension: expected {', '.join(SUFFIXES)}")
    figure = plot_runs(runs, config.x)
    with atomic_write(out) as file:
        figure.savefig(file, format=out.suffix[1:].lower())
    print(" | ".join([str(out), *(f"{run.name}: {run.best()}" for run in runs)]))


def read_run(folder: Path) -> Run:
    """Return the run in a folder, as far as it has been written.

    Raises UserError if it has no losses.
    """
    records = read_metrics(folder / "metrics.jsonl")
    train = [record for record in records if record["split"] == "train"]
    val = [record for record in records if record["split"] == "val"]
    if not train and not val:
        raise UserError(f"no losses in {folder / 'metrics.jsonl'}: pass the log_dir of a run "
                        f"(python -m scripts.train)")
    config = folder / "config.yaml"
    settings = read_yaml(str(config)) if config.exists() else {}
    model_settings = settings.pop("model", None) or {}
    return Run(str(folder), train, val, {**model_settings, **settings})


def legend_labels(runs: list[Run]) -> list[str]:
    """Return a label for each run: its name, best loss and the settings in which the runs differ,
    truncated to fit."""
    all_keys = dict.fromkeys(key for run in runs for key in run.settings)  # ordered
    keys = []
    for key in all_keys:
        different = {str(run.settings[key]) for run in runs if key in run.settings}
        if key != "log_dir" and len(different) > 1:
            keys.append(key)
    labels = []
    for run in runs:
        values = {key: str(run.settings[key]) for key in keys if key in run.settings}
        settings = [f"{key}={value if len(value) <= 20 else '…' + value[-20:]}"
                    for key, value in values.items()]
        name = run.name if len(run.name) <= 60 else "…" + run.name[-60:]
        label = ", ".join([f"{name}: {run.best()}", *settings])
        label = textwrap.shorten(label, width=115, placeholder=" …")
        labels.append(" " + label)  # matplotlib leaves out labels that start with an underscore
    return labels


def plot_runs(runs: list[Run], x_axis: str) -> Figure:
    """Return a figure of the runs over "steps" or "tokens".

    Raises UserError if a run's tokens are unknown.
    """
    rcParams.update(RC_PARAMS)  # type: ignore[arg-type]
    figure = Figure(figsize=(10, 7 + 0.2 * len(runs)), dpi=160, layout="constrained")
    panels = figure.subplot_mosaic([["loss"] * 3, ["lr", "grad_norm", "tokens_per_s"]],
                                   height_ratios=[2, 1])
    # STYLES() never ends.
    for run, label, style in zip(runs, legend_labels(runs), STYLES(), strict=False):
        if x_axis == "tokens" and "total_batch_size" not in run.settings:
            raise UserError(f"no total_batch_size in {run.name}/config.yaml for --x tokens: "
                            f"pass --x steps")
        x_scale = run.settings["total_batch_size"] if x_axis == "tokens" else 1
        plot_run(panels, run, label, style, x_scale, len(runs))
    for key, panel in panels.items():
        panel.set_title(TITLES[key])
        panel.locator_params("x", integer=True)
        panel.xaxis.set_major_formatter(EngFormatter(sep=""))  # 20k
        panel.yaxis.set_major_formatter("{x:,.10g}")  # 0.0006 and 20,000
        curves = [curve(records, key) for run in runs for records in (run.train, run.val)]
        panel.set_ylim(axis_limits(curves))
        if key != "loss":
            panel.set_ylim(bottom=0)
    figure.supxlabel(x_axis, fontsize="medium")
    figure.legend(loc="outside upper left")
    return figure


def plot_run(panels: dict[str, Any], run: Run, label: str, style: dict[str, Any], x_scale: float,
             n_runs: int) -> None:
    """Draw one of `n_runs` runs into the panels, with x = `x_scale` * step."""
    for key, panel in panels.items():
        steps, values = curve(run.train, key)
        if key != "lr":
            panel.plot(steps * x_scale, values, color=style["color"], linewidth=0.5,
                       alpha=0.35 / n_runs ** 0.5)
            steps, values = moving_average(steps), moving_average(values)
        panel.plot(steps * x_scale, values, marker="." if len(steps) == 1 else "", **style)
    panel = panels["loss"]
    steps, losses = curve(run.val, "loss")
    panel.plot(steps * x_scale, losses, label=label, linewidth=1, marker="o",
               markeredgecolor="white", markevery=len(steps) // 30 + 1, **style)
    if len(losses):
        best = steps[losses.argmin()] * x_scale, losses.min()
        panel.plot(*best, marker="*", markersize=16, markeredgecolor="white", color=style["color"],
                   zorder=3)
        if n_runs == 1:  # the values of several runs could overlap: only the legend has them
            panel.annotate(f"{losses.min():.4f}", best, (0, 10), textcoords="offset points",
                           ha="center")


def curve(records: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps and the values, (N,) each,
    of the records whose value is neither null nor missing."""
    steps = np.array([record["step"] for record in records])
    values = np.array([record.get(key) for record in records], dtype=float)  # None becomes nan
    return steps[np.isfinite(values)], values[np.isfinite(values)]


def moving_average(y: np.ndarray) -> np.ndarray:
    """Return the centred moving average of y, (N,), without the ends,
    where the window is not full."""
    window = 2 * round(len(y) * SMOOTHING_FRACTION / 2) + 1
    return np.convolve(y, np.ones(window) / window, "valid") if len(y) else y


def axis_limits(curves: list[tuple[np.ndarray, np.ndarray]]) -> tuple[float, float]:
    """Return y limits that show these curves, (steps, values) each, except their first steps
    and rare spikes."""
    late = [values[steps >= int(steps[-1] * SKIP_FRACTION)]
            for steps, values in curves if len(steps)]
    low = min((np.percentile(values, 1) for values in late), default=0)
    high = max((np.percentile(values, 99) for values in late), default=1)
    margin = 0.1 * (high - low) or 0.1 * high or 1
    return low - margin, high + margin


if __name__ == "__main__":
    run_cli(main, PlotConfig)
