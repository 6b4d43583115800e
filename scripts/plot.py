"""A picture of runs, one over the other: python -m scripts.plot log/ [other_run/ ...] [--x tokens] [--out FILE.png]"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from tyro.conf import Positional

from gpt.errors import UserError
from gpt.files import atomic_write, read_metrics
from scripts import cli

# Okabe and Ito (2008), without the yellow, which is too pale for lines: people who are colour-blind tell these apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS, LINES = "os^DvPX", ["-", "--", "-.", ":"]
LOOK = {"font.size": 11, "legend.fontsize": 10, "legend.frameon": False, "legend.handlelength": 3, "axes.xmargin": 0.02,
        "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False,
        "axes.titlelocation": "left", "text.parse_math": False}
PANELS = {"loss": "loss, nats per token", "lr": "learning rate", "grad_norm": "gradient norm",
          "tokens_per_s": "tokens per second"}
INCIDENTAL = ("micro_batch_size", "eval_", "save_", "sample_", "hellaswag_", "log_every", "tensorboard", "wandb_",
              "device", "compile", "rank_timeout")  # settings that hardly change what a run learns
WINDOW, FIRST = 0.04, 0.05  # shares of a run: what is averaged, and the first steps that may leave the picture
KINDS = (".png", ".jpg", ".pdf", ".svg")
LABEL_WIDTH = 110  # characters that a line of the legend has room for


@dataclass
class PlotConfig:
    """Settings of scripts.plot."""

    runs: Positional[list[str]] = field(default_factory=lambda: ["log"])  # folders of the runs (their log_dir)
    x: Literal["steps", "tokens"] = "steps"  # unit of the x axis
    out: str | None = None  # image file; unset: plot.png in the first run


@dataclass
class Run:
    """What a run's folder holds: records of metrics.jsonl, and settings by flat names (model.n_layer)."""

    folder: Path
    train: list[dict]
    val: list[dict]
    settings: dict[str, Any] | None

    def best(self) -> str:
        """The lowest validation loss and its step, in words."""
        if not self.val:
            return "no validation loss"
        best = min(self.val, key=lambda record: record["loss"])
        return f"best val loss {best['loss']:.4f} at step {best['step']:,}"


def main(config: PlotConfig) -> None:
    """Draw the picture, and print where it is and the best validation loss of each run."""
    runs = read_runs(config.runs)
    out = Path(config.out or runs[0].folder / "plot.png")
    if out.suffix.lower() not in KINDS:
        raise UserError(f"out {str(out)!r} is of no kind that can be drawn: expected a name that ends in "
                        f"{', '.join(KINDS[:-1])} or {KINDS[-1]}")
    if not out.parent.is_dir():
        raise UserError(f"out {str(out)!r}: there is no folder {str(out.parent)!r}; make it, or choose another")
    figure = draw(runs, config.x)
    with atomic_write(out) as file:
        figure.savefig(file, format=out.suffix[1:].lower())
    print(" | ".join([str(out), *(f"{name}: {run.best()}" for name, run in zip(names(runs), runs, strict=True))]))


def read_runs(folders: list[str]) -> list[Run]:
    """The runs in these folders that have losses; what is missing is said on standard error. Raises UserError."""
    runs, empty = [], []
    for folder in map(Path, dict.fromkeys(map(os.path.normpath, folders))):
        if not folder.exists():
            raise UserError(f"there is no folder {str(folder)!r}: expected the log_dir of a run, with metrics.jsonl")
        run, missing = read_run(folder)
        if not run.train and not run.val:
            empty.append(str(folder / "metrics.jsonl"))
            continue
        runs.append(run)
        if missing:
            print(f"{folder}: {'; '.join(missing)}", file=sys.stderr)
    if not runs:
        raise UserError(f"no losses in {', '.join(empty) or 'no folder'}: expected the log_dir of a run, such as "
                        f"`python -m scripts.train` makes")
    if empty:
        print(f"left out, without losses: {', '.join(empty)}", file=sys.stderr)
    return runs


def read_run(folder: Path) -> tuple[Run, list[str]]:
    """What is in a run's folder as far as it can be read, and what is missing, in words."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    records = read_metrics(path)  # after the lines were counted: those that a run adds meanwhile are not broken
    broken = sum(1 for line in lines if line.strip()) - len(records)
    train, val = ([r for r in records if r["split"] == split] for split in ("train", "val"))
    try:
        settings = flat(yaml.safe_load((folder / "config.yaml").read_bytes()))
    except (OSError, AttributeError, yaml.YAMLError):  # AttributeError: it holds something else than settings
        settings = None
    missing = {f"{broken} broken line{'s' * (broken > 1)} of metrics.jsonl left out": broken > 0,
               "no training loss": not train, "no validation loss": not val,
               "no settings in the legend, config.yaml is missing or broken": settings is None}
    return Run(folder, train, val, settings), [words for words, is_so in missing.items() if is_so]


def flat(settings: dict, prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names: {"model": {"n_layer": 4}} is {"model.n_layer": 4}."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return result


def names(runs: list[Run]) -> list[str]:
    """The runs' folders, as seen from the deepest folder that holds them all."""
    paths = [os.path.abspath(run.folder) for run in runs]
    try:
        return [os.path.relpath(path, os.path.commonpath([os.path.dirname(each) for each in paths])) for path in paths]
    except ValueError:  # two drives of Windows
        return paths


def differences(settings: list[dict[str, Any]]) -> list[str]:
    """Names of the settings in which runs differ, the most telling first: those that may change what is learned before
    the others, then those that tell more runs apart, then in the order of config.yaml."""
    values = {key: len({repr(each[key]) for each in settings if key in each}) for each in settings for key in each}
    return sorted((key for key, count in values.items() if count > 1 and key != "log_dir"),
                  key=lambda key: (key.startswith(INCIDENTAL), -values[key]))


def shortened(value: Any, width: int = 24) -> str:
    """A setting as YAML has it, on one line; what is too long lacks its middle."""
    line = " ".join((value if isinstance(value, str) else json.dumps(value, default=str)).split())
    return line if len(line) <= width else f"{line[:width // 2]}…{line[len(line) + 1 - width + width // 2:]}"


def labels(runs: list[Run]) -> list[str]:
    """A line for each run: its name, its best loss, and as many of the settings that differ as have room."""
    keys = differences([run.settings for run in runs if run.settings])
    lines: list[str] = []
    for count in range(len(keys), -1, -1):
        more = [f"+{len(keys) - count} more"] * (count < len(keys))
        lines = [", ".join([f"{shortened(name, 36)}: {run.best()}", *(
            [f"{key}={shortened(run.settings[key])}" for key in keys[:count] if key in run.settings] + more
            if run.settings else [])]) for name, run in zip(names(runs), runs, strict=True)]
        if max(map(len, lines)) <= LABEL_WIDTH:
            break
    return lines


def draw(runs: list[Run], x_axis: str) -> Any:
    """The picture, a matplotlib Figure: the losses, and below them learning rate, gradient norm and tokens/s."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is not installed: pip install matplotlib") from None
    matplotlib.rcdefaults()  # the same picture whatever a matplotlibrc says
    matplotlib.rcParams.update(LOOK)  # type: ignore[arg-type]
    figure: Any = Figure(figsize=(10, 7.5 + 0.25 * len(runs)), dpi=160, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    panels = figure.subplot_mosaic([["loss"] * 3, list(PANELS)[1:]], height_ratios=[2.2, 1])
    handles = [draw_run(panels, run, x_axis, i, len(runs)) for i, run in enumerate(runs)]
    for key, panel in panels.items():
        panel.set_title(PANELS[key])
        curves = [(column(run.train, "step"), column(run.train, key)) for run in runs]
        if key == "loss":
            curves += [(column(run.val, "step"), column(run.val, key)) for run in runs]
        panel.set_ylim(*limits(curves, first=0 if key == "lr" else FIRST, zero=key in ("lr", "tokens_per_s")))
        if not any(np.isfinite(y).any() for _, y in curves):
            panel.text(0.5, 0.5, "not logged", transform=panel.transAxes, ha="center")
        panel.xaxis.set_major_formatter(plain)
        panel.yaxis.set_major_formatter(plain)
        panel.locator_params("x", nbins=8 if key == "loss" else 3, integer=x_axis == "steps")
    kinds: dict[str, dict[str, Any]] = {
        "training": {"linewidth": 0.6}, f"mean over {WINDOW:.0%} of the run": {"linewidth": 1.6},
        "validation": {"linewidth": 1, "marker": "o"}, "lowest": {"linewidth": 0, "marker": "*", "markersize": 12}}
    for words, style in kinds.items():
        panels["loss"].plot([], [], color="0.4", label=words, **style)
    panels["loss"].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, borderaxespad=0)
    figure.supxlabel("millions of tokens" if x_axis == "tokens" else "steps", fontsize=11)
    every = names(runs)
    title = ", ".join(every) if len(every) <= 3 else f"{len(every)} runs: {every[0]} … {every[-1]}"
    figure.legend(handles, [f" {line}" for line in labels(runs)], loc="outside upper left", title=shortened(title, 76),
                  alignment="left", title_fontproperties={"weight": "bold", "size": 14})  # " ": "_name" would be hidden
    return figure


def draw_run(panels: dict[str, Any], run: Run, x_axis: str, i: int, n_runs: int) -> Any:
    """Draw the i-th of n runs; returns a line of its style for the legend."""
    colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
    style: dict[str, Any] = {"color": colour, "linestyle": LINES[i // len(COLOURS) % len(LINES)]}
    x = positions(run, run.train, x_axis)
    for key, panel in panels.items():
        y = column(run.train, key)
        if key != "lr":
            panel.plot(x, y, color=colour, linewidth=0.5, alpha=0.35 / n_runs ** 0.5, zorder=1, rasterized=True)
            y = smoothed(y)
        panel.plot(x, y, linewidth=1.6, marker="." * (len(x) == 1), **style)
    x, y = positions(run, run.val, x_axis), column(run.val, "loss")
    panels["loss"].plot(x, y, linewidth=1, marker=marker, mec="white", markevery=len(y) // 30 + 1, **style)
    if run.val:
        best = x[y.argmin()], y.min()
        panels["loss"].plot(*best, marker="*", markersize=16, mec="white", color=colour, zorder=3)
        if n_runs == 1:  # the values of several could lie one over the other: only the legend has them
            panels["loss"].annotate(f"{y.min():.4f}", best, (0, 10), textcoords="offset points", ha="center",
                                    weight="bold")
    return panels["loss"].plot([], [], linewidth=2, marker=marker, **style)[0]


def positions(run: Run, records: list[dict], x_axis: str) -> np.ndarray:
    """Where on the x axis these records of the run lie, (N,): updates, or millions of tokens, before the loss was
    taken. Raises UserError if the run does not tell its tokens."""
    steps = column(records, "step")
    if x_axis == "steps":
        return steps
    tokens = {record["step"] + 1: record["tokens"] for record in run.train if "tokens" in record}
    if not tokens:
        raise UserError(f"the tokens of {run.folder} are not known, it has no training records: pass --x steps")
    return np.interp(steps, [0, *tokens], [0, *tokens.values()]) / 1e6


def column(records: list[dict], key: str) -> np.ndarray:
    """One value of each record, (N,); not a number where it is missing or null."""
    return np.array([record.get(key) for record in records], dtype=float)  # None becomes not a number


def smoothed(y: np.ndarray) -> np.ndarray:
    """The mean of the values around each one, (N,): WINDOW of the run, less at its ends. Unlike an exponential average
    it does not lag behind a curve that falls."""
    known = np.isfinite(y)
    i = np.arange(len(y))
    half = np.minimum(round(len(y) * WINDOW / 2), i)  # at the beginning as far ahead as behind: there it falls fast
    first, last = i - half, np.minimum(i + half + 1, len(y))
    total, count = (np.concatenate([[0], np.cumsum(each)]) for each in (np.where(known, y, 0), known))
    with np.errstate(invalid="ignore"):  # where no value is known, 0 / 0 is not a number
        return (total[last] - total[first]) / (count[last] - count[first])


def limits(curves: list[tuple[np.ndarray, np.ndarray]], first: float, zero: bool) -> tuple[float, float]:
    """Limits of a y axis that show these curves (steps, values), from 0 if `zero`, without the `first` share of each
    and without the rarest outliers: they would flatten all the rest."""
    late = [y[(steps >= int(steps[-1] * first)) & np.isfinite(y)] for steps, y in curves if len(steps)]
    late = [np.percentile(y, [0.5, 99.5]) for y in late if len(y)] or [np.array([0, 1])]
    low, high = min(y[0] for y in late), max(y[1] for y in late)
    low = 0 if zero else low
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1
    return low - margin * (not zero), high + margin


def plain(value: float, _: int) -> str:
    """A tick's label: 0.0006 rather than 6e-4, and 20,000."""
    return f"{round(value, 9) + 0.0:,.9f}".rstrip("0").rstrip(".")  # + 0.0: -0.0 is 0


if __name__ == "__main__":
    cli.run_cli(main, PlotConfig)
