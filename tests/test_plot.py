"""scripts.plot: content and layout of the figure, also for incomplete runs."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt.errors import UserError
from scripts.plot import PlotConfig, Run, comparable_loss, main, moving_average, plot_runs, read_run
from tests.conftest import ROOT, TINY_BYTES, metrics, train


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_run(name: str, steps: int = 40, val: dict[int, float] | None = None,
             bytes_per_token: float = 4, acc_norm: float | None = None) -> Run:
    """Write and read a run of 1,000 tokens per step at 2,000 tokens/s;
    training loss falls from 5 to 3, and one gradient norm is null."""
    records = [{"step": step, "split": "train", "loss": 3 + 2 * 0.8 ** step, "lr": 6e-4,
                "tokens": 1000 * (step + 1), "tokens_per_s": 2000.0,
                "grad_norm": None if step == 7 else 1.0} for step in range(steps)]
    val = {10: 4.25, 20: 3.5, 30: 3.75} if val is None else val
    records += [{"step": step, "split": "val", "loss": loss,
                 "bits_per_byte": loss / math.log(2) / bytes_per_token}
                for step, loss in val.items()]
    if acc_norm:
        records.append({"step": 30, "split": "hellaswag", "acc_norm": acc_norm})
    Path(name).mkdir()
    Path(name, "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    return read_run(name)


def test_plot_draws_a_run_of_scripts_train_without_importing_torch(byte_data, tmp_path):
    train(byte_data, tmp_path / "log", *TINY_BYTES, "--max_steps", "6", "--eval_every", "2")
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "scripts.plot", "--x", "time"],
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    best = min(metrics(tmp_path / "log", "val").values(), key=lambda record: record["loss"])
    assert done.stdout == (f"log/plot.png | log: best val loss {best['loss']:.4f} "
                           f"at step {best['step']}\n")
    assert Path("log/plot.png").read_bytes().startswith(b"\x89PNG")
    modules = done.stderr.split()  # the imported modules
    assert "matplotlib" in modules and "torch" not in modules


def test_extension_selects_the_image_format(capsys):
    make_run("a"), make_run("b", val={5: 4.0, 1000: 3.125})
    for suffix, start in {"jpg": b"\xff\xd8", "svg": b"<?xml"}.items():
        main(PlotConfig(["a/metrics.jsonl", "b/"], out=f"both.{suffix}"))
        assert Path(f"both.{suffix}").read_bytes().startswith(start)
    assert capsys.readouterr().out.endswith("both.svg | a: best val loss 3.5000 at step 20 | "
                                            "b: best val loss 3.1250 at step 1,000\n")


@pytest.mark.parametrize("unit, scale", [("steps", 1), ("tokens", 1000), ("time", 0.5 / 60)])
def test_curves_are_at_the_positions_of_their_records(unit, scale):
    panels = plot_runs([make_run("a", acc_norm=0.3)], unit, "loss").axes
    raw, smooth, val, star = panels[0].lines
    np.testing.assert_allclose(raw.get_xdata(), np.arange(40) * scale)
    np.testing.assert_allclose(raw.get_ydata(), 3 + 2 * 0.8 ** np.arange(40))
    np.testing.assert_allclose(smooth.get_xdata(), np.arange(1, 39) * scale)  # windows of 3 steps
    np.testing.assert_allclose(val.get_xydata(),
                               [[10 * scale, 4.25], [20 * scale, 3.5], [30 * scale, 3.75]])
    np.testing.assert_allclose(star.get_xydata(), [[20 * scale, 3.5]])
    assert [text.get_text() for text in panels[0].texts] == ["3.5000"]
    assert [set(panel.lines[0].get_ydata()) for panel in panels[1:4]] == [{6e-4}, {1.0}, {2000.0}]
    results, openai = panels[4].lines[-2:]
    np.testing.assert_allclose(results.get_xydata(), [[30 * scale, 0.3]])
    assert set(openai.get_ydata()) == {0.2955}


def test_runs_with_different_tokenizers_are_compared_in_bits_per_byte(capsys):
    """Nats per token of 2 bytes and of 4 bytes are not comparable."""
    runs = [make_run("a"), make_run("b", bytes_per_token=2)]
    assert comparable_loss(runs) == "bits_per_byte" and comparable_loss(runs[:1]) == "loss"
    panel = plot_runs(runs, "steps", "bits_per_byte").axes[0]
    lowest = [line.get_ydata().min() for line in panel.lines if len(line.get_ydata()) == 3]
    np.testing.assert_allclose(lowest, [3.5 / math.log(2) / 4, 3.5 / math.log(2) / 2])
    main(PlotConfig(["a", "b"]))
    assert "a: best val loss 1.2624 bits per byte at step 20 |" in capsys.readouterr().out


def test_moving_average_keeps_a_straight_line():
    """No lag, no bend at the ends."""
    np.testing.assert_allclose(moving_average(np.arange(1000)), np.arange(20, 980))


def test_figure_has_no_overlaps_and_one_style_per_run():
    figure = plot_runs([make_run(f"_{i}") for i in range(10)], "steps", "loss")
    figure.draw_without_rendering()
    [legend] = figure.legends
    names = [text.get_text().split(":")[0] for text in legend.get_texts()]
    assert names == [f" _{i}" for i in range(10)]
    styles = {(line.get_color(), line.get_linestyle()) for line in legend.legend_handles}
    assert len(styles) == 10
    boxes = [legend.get_window_extent(), *(panel.get_tightbbox() for panel in figure.axes)]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_main_plots_incomplete_runs(capsys):
    make_run("train_only", val={}), make_run("val_only", steps=0)
    with open("train_only/metrics.jsonl", "a") as file:
        file.write('{"step": 40, "split": "tra')  # still being written
    main(PlotConfig(["train_only", "val_only"]))
    assert capsys.readouterr().out == ("train_only/plot.png | train_only: no validation loss | "
                                       "val_only: best val loss 3.5000 at step 20\n")


@pytest.mark.parametrize("config, message", [
    (PlotConfig(["a", "empty"]), "no losses in empty/metrics.jsonl: pass the log_dir of a run"),
    (PlotConfig(["a"], out="x.docx"), "x.docx has an unknown extension: expected .png, .jpg")])
def test_main_names_the_problem(config, message):
    make_run("a"), Path("empty").mkdir()
    with pytest.raises(UserError, match=message):
        main(config)
    assert {str(path) for path in Path().rglob("*")} == {"a", "empty", "a/metrics.jsonl"}
