"""scripts.plot: the curves of a run, and runs that can be compared."""

import json
from pathlib import Path

import numpy as np
import pytest

from scripts.plot import PlotConfig, main, plot_runs, read_run
from tests.conftest import metrics, run


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make_run(name, bytes_per_token=4):
    """Write and read a run of 40 steps, each of 1,000 tokens in half a second."""
    records = [{"step": step, "split": "train", "loss": 5 - step / 20, "lr": 6e-4,
                "grad_norm": None if step == 7 else 1, "tokens": 1000 * (step + 1),
                "tokens_per_s": 2000} for step in range(40)]
    for step, loss in ((10, 4.25), (20, 3.5), (30, 3.75)):
        records.append({"step": step, "split": "val", "loss": loss,
                        "bits_per_byte": loss / bytes_per_token})
    records.append({"step": 30, "split": "hellaswag", "acc_norm": 0.3})
    Path(name).mkdir()
    Path(name, "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    return read_run(name)


def test_command_draws_a_run_of_scripts_train(uninterrupted_run, tmp_path):
    out = tmp_path / "plot.png"
    done = run("-m", "scripts.plot", uninterrupted_run, "--out", out)
    best = min(metrics(uninterrupted_run, "val").values(), key=lambda record: record["loss"])
    assert done.stdout == (f"{out} | {uninterrupted_run}: best val loss {best['loss']:.4f} "
                           f"at step {best['step']}\n")
    assert out.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("unit, scale", [("steps", 1), ("tokens", 1000), ("time", 0.5 / 60)])
def test_curves_are_at_the_positions_of_their_records(unit, scale):
    panels = plot_runs([make_run("a")], unit, "loss").axes
    training, smooth, validation, best = panels[0].lines
    step = np.arange(40)
    np.testing.assert_allclose(training.get_xydata(), np.c_[step * scale, 5 - step / 20])
    np.testing.assert_allclose(smooth.get_xydata(), training.get_xydata()[1:-1])  # mean of three
    np.testing.assert_allclose(
        validation.get_xydata(), [[10 * scale, 4.25], [20 * scale, 3.5], [30 * scale, 3.75]])
    np.testing.assert_allclose(best.get_xydata(), [[20 * scale, 3.5]])
    np.testing.assert_allclose(panels[-1].lines[0].get_xydata(), [[30 * scale, 0.3]])


def test_runs_with_different_tokenizers_are_compared_in_bits_per_byte(capsys):
    """Nats per token of 2 bytes and of 4 bytes are not comparable."""
    runs = [make_run("a"), make_run("b", bytes_per_token=2)]
    main(PlotConfig(["a/metrics.jsonl", "b/"], out="both.SVG"))
    assert capsys.readouterr().out == ("both.SVG | a: best val loss 0.8750 bits per byte at step 20"
                                       " | b: best val loss 1.7500 bits per byte at step 20\n")
    assert Path("both.SVG").read_bytes().startswith(b"<?xml")
    curve = plot_runs(runs, "steps", "bits_per_byte").axes[0].lines[0]
    assert curve.get_ydata().min() == 0.875


def test_run_that_is_being_written_is_drawn(capsys):
    Path("metrics.jsonl").write_text('{"step": 0, "split": "train", "loss": 11}\n{"step": 1, "sp')
    main(PlotConfig(["metrics.jsonl"]))
    assert capsys.readouterr().out == "plot.png | .: no validation loss\n"
