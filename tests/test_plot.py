"""scripts.plot, as typed: what the picture shows, and what happens where a run is incomplete."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from scripts.plot import COLOURS, PlotConfig, differences, draw, labels, limits, main, plain, read_run, smoothed
from tests.conftest import ROOT, TINY_BYTES, assert_flag_refused, assert_refused, environment, metrics, run, train

SETTINGS = {"data_root": "data", "log_dir": "log", "model": {"n_layer": 2, "n_embd": 16}, "total_batch_size": 1000,
            "micro_batch_size": 4, "optimizer": "adamw", "max_lr": 0.001, "betas": [0.9, 0.95]}


def make_run(folder: Path, steps: int = 40, val: dict[int, float] | None = None, settings: dict | None = None) -> Path:
    """A run's folder; its training loss falls from 5 to 3."""
    records = [{"step": step, "split": "train", "loss": 3 + 2 * 0.8 ** step, "lr": 6e-4, "grad_norm": 1.0,
                "tokens": (step + 1) * 1000, "tokens_per_s": 5000.5} for step in range(steps)]
    val = {10: 4.25, 20: 3.5, 30: 3.75} if val is None else val
    records += [{"step": step, "split": "val", "loss": loss, "perplexity": 1.0} for step, loss in val.items()]
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text(yaml.safe_dump(SETTINGS | (settings or {}), sort_keys=False))
    return folder


def figure_of(*folders: Path, x: str = "steps") -> Figure:
    return draw([read_run(folder)[0] for folder in folders], x)


def plot(*words: str | Path) -> subprocess.CompletedProcess:
    return run("-m", "scripts.plot", *words)


def drawn(path: Path) -> tuple[tuple[int, int], list[bool]]:
    """Width and height of a PNG in pixels, and which of the first two colours are in it."""
    pixels = imread(path)[:, :, :3]
    shown = [bool((np.abs(pixels - to_rgb(colour)).max(axis=2) < 0.01).sum() > 100) for colour in COLOURS[:2]]
    return pixels.shape[1::-1], shown


def test_a_run_of_this_repository_is_drawn(byte_data, tmp_path):
    """What scripts.train writes is what scripts.plot reads; by default the picture lies with the run, alone."""
    log = tmp_path / "log"
    train(byte_data, log, *TINY_BYTES, "--max_steps", "6", "--eval_every", "2")
    before, losses = {path.name for path in log.iterdir()}, {s: r["loss"] for s, r in metrics(log, "val").items()}
    best = min(losses, key=losses.get)
    done = plot(f"{log}/")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == f"{log}/plot.png | log: best val loss {losses[best]:.4f} at step {best}\n"
    assert {path.name for path in log.iterdir()} == before | {"plot.png"}
    assert drawn(log / "plot.png") == ((1600, 1240), [True, False])


def test_several_runs_share_one_picture(tmp_path):
    """Both are drawn and named once, also if a folder is given twice."""
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", val={5: 4.0, 1000: 3.125})
    done = plot("--x", "tokens", a, b, f"{a}/", f"--out={tmp_path}/both.png")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == (f"{tmp_path}/both.png | a: best val loss 3.5000 at step 20 | "
                           f"b: best val loss 3.1250 at step 1,000\n")
    assert drawn(tmp_path / "both.png") == ((1600, 1280), [True, True])
    assert not (a / "plot.png").exists()


def test_without_a_folder_it_draws_log_and_does_not_load_pytorch(tmp_path):
    """`python -m scripts.plot --x tokens` in a folder with a log."""
    make_run(tmp_path / "log")
    code = ("import runpy, sys\nsys.argv = ['plot', '--x', 'tokens']\ntry:\n"
            "    runpy.run_module('scripts.plot', run_name='__main__', alter_sys=True)\n"
            "finally:\n    assert 'torch' not in sys.modules and 'transformers' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**environment(), "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "log/plot.png | log: best val loss 3.5000 at step 20\n"


@pytest.mark.parametrize("kind, start", [("jpg", b"\xff\xd8"), ("pdf", b"%PDF"), ("svg", b"<?xml"), ("PNG", b"\x89P")])
def test_the_ending_chooses_the_kind_of_picture(kind, start, tmp_path, monkeypatch):
    """A .pdf is one for the readers of PDF too."""
    monkeypatch.chdir(tmp_path)
    main(PlotConfig([str(make_run(tmp_path / "a"))], out=f"picture.{kind}"))  # in the folder one is in
    assert (tmp_path / f"picture.{kind}").read_bytes().startswith(start)


def test_curves_lie_at_the_steps_and_tokens_of_their_records(tmp_path):
    """Training and validation of the same model are at the same place, and the star is at the lowest validation."""
    folder = make_run(tmp_path / "a")
    for x_axis, scale in (("steps", 1), ("tokens", 1e-3)):  # in millions, 1,000 a step
        figure = figure_of(folder, x=x_axis)
        panels = {panel.get_title(loc="left"): panel for panel in figure.axes}
        loss = panels["loss, nats per token"]
        raw, val, star = loss.lines[0], loss.lines[2], loss.lines[3]
        np.testing.assert_allclose(raw.get_xdata(), np.arange(40) * scale)
        np.testing.assert_allclose(raw.get_ydata(), 3 + 2 * 0.8 ** np.arange(40))
        np.testing.assert_allclose(loss.lines[1].get_ydata(), smoothed(raw.get_ydata()))
        np.testing.assert_allclose(val.get_xydata(), [[10 * scale, 4.25], [20 * scale, 3.5], [30 * scale, 3.75]])
        np.testing.assert_allclose(star.get_xydata(), [[20 * scale, 3.5]])
        assert star.get_marker() == "*" and [each.get_text() for each in loss.texts] == ["3.5000"]
        assert set(panels["learning rate"].lines[0].get_ydata()) == {6e-4}
        assert set(panels["gradient norm"].lines[0].get_ydata()) == {1.0}
        assert set(panels["tokens per second"].lines[0].get_ydata()) == {5000.5}
        assert panels["tokens per second"].get_ylim()[0] == panels["learning rate"].get_ylim()[0] == 0
    assert figure.get_supxlabel() == "millions of tokens"


def test_smoothing_is_the_mean_of_the_values_around():
    """Against the plain formula, for runs of any length and with gradient norms that are null."""
    for n in (1, 2, 3, 49, 50, 1234, 20_000):
        y = np.random.default_rng(n).normal(4, 1, n)
        y[np.random.default_rng(0).random(n) < 0.2] = np.nan
        half, result = round(n * 0.02), smoothed(y)
        for i in {0, 1, n // 3, n - 2, n - 1} & set(range(n)):
            around = [value for value in y[i - min(i, half):i + min(i, half) + 1] if not np.isnan(value)]
            assert result[i] == (pytest.approx(np.mean(around)) if around else pytest.approx(np.nan, nan_ok=True))
    falling = np.linspace(9, 3, 1000)
    np.testing.assert_allclose(smoothed(falling)[:-20], falling[:-20])  # without a lag, from the first step


def test_the_first_steps_and_rare_spikes_do_not_flatten_the_rest():
    """Of 20,000 steps the last 19,000 fill the height; of three steps all are seen."""
    steps = np.arange(20_000)
    loss = 3 + 8 * np.exp(-steps / 300)
    loss[15_000] = 100
    low, high = limits([(steps, loss), (np.array([0, 10_000, 20_000]), np.array([11, 3.1, 2.9]))], 0.05, zero=False)
    assert 2.7 < low < 2.9 and loss[1200] < high < 4
    low, high = limits([(np.arange(3), np.array([11.0, 9.0, 8.0]))], 0.05, zero=False)
    assert low < 8 and high > 11
    assert limits([(np.arange(3), np.full(3, 6e-4))], 0, zero=True) == (0, pytest.approx(6e-4, rel=0.2))


def test_numbers_on_the_axes_are_plain():
    """A learning rate is 0.0006, not 6e-4."""
    numbers = {0.0006: "0.0006", 1e-7: "0.0000001", 20_000: "20,000", -0.0: "0", 0.1 + 0.2: "0.3", 1e6: "1,000,000"}
    assert {value: plain(value, 0) for value in numbers} == numbers


def test_the_settings_that_differ_are_found_the_most_telling_first():
    """Not log_dir, not what only one run knows; those that hardly matter come last."""
    a = {"log_dir": "a", "device": "cpu", "micro_batch_size": 4, "seed": 1, "optimizer": "adamw", "max_lr": 1e-3,
         "betas": [0.9, 0.95], "same": None, "new": 1}
    b = {**a, "log_dir": "b", "device": "cuda", "micro_batch_size": 8, "optimizer": "muon", "max_lr": 2e-3}
    c = {**b, "log_dir": "c", "max_lr": 4e-3, "betas": [0.9, 0.99]}
    del c["new"]
    assert differences([a, b]) == ["optimizer", "max_lr", "device", "micro_batch_size"]
    assert differences([a, b, c]) == ["max_lr", "optimizer", "betas", "device", "micro_batch_size"]
    assert differences([a]) == differences([a, a]) == differences([]) == []


def test_the_legend_has_each_runs_folder_best_loss_and_settings(tmp_path):
    """Nested settings are written as flags are, long values lose their middle, and what has no room is counted."""
    def lines(*folders):
        return labels([read_run(folder)[0] for folder in folders])

    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", val={}, settings={"model": {"n_layer": 4, "n_embd": 16}})
    assert lines(a, b) == ["a: best val loss 3.5000 at step 20, model.n_layer=2",
                           "b: no validation loss, model.n_layer=4"]
    assert lines(a) == ["a: best val loss 3.5000 at step 20"]
    c = make_run(tmp_path / "more" / "c", settings={"data_root": "/a/very/long/path/to/some/tokens/of/books"})
    assert lines(a, c)[1] == "more/c: best val loss 3.5000 at step 20, data_root=/a/very/long…ns/of/books"
    d = make_run(tmp_path / "d", settings={name: value * 2 for name, value in SETTINGS.items() if name != "model"})
    assert lines(a, d)[0].endswith("data_root=data, total_batch_size=1000, optimizer=adamw, +3 more")
    assert all(len(line) <= 110 for line in lines(a, b, c, d))


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_nothing_lies_over_anything_else(count, tmp_path):
    """Legend, titles and panels keep apart and inside, also with long names, and no two runs look alike."""
    folders = [make_run(tmp_path / f"_$a_folder^$_with_a_{'very_' * 9}long_name_{i}", settings={"max_lr": i / 7})
               for i in range(count)]
    figure = figure_of(*folders)
    figure.draw_without_rendering()
    legend = figure.legends[0]
    assert len(legend.get_texts()) == count and all("_$a_folder" in text.get_text() for text in legend.get_texts())
    assert len({(line.get_color(), line.get_linestyle()) for line in legend.legend_handles}) == count
    loss = figure.axes[0]
    assert not loss.get_legend().get_window_extent().overlaps(loss._left_title.get_window_extent())
    boxes = [legend.get_window_extent(), *(panel.get_tightbbox() for panel in figure.axes)]
    for i, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 and box.y0 >= 0
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_what_runs_have_is_drawn(tmp_path):
    """One has only a training step, the other only validations: what is missing is said."""
    a, b = make_run(tmp_path / "a", steps=1, val={}), make_run(tmp_path / "b", steps=0)
    done = plot(a, b)
    assert done.returncode == 0 and done.stderr == f"{a}: no validation loss\n{b}: no training loss\n"
    assert drawn(a / "plot.png")[1] == [True, True]


def test_gradient_norms_of_skipped_steps_are_gaps(tmp_path):
    """fp16 logs null; with nothing but null the panel says so."""
    folder = make_run(tmp_path / "a")
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace('"grad_norm": 1.0', '"grad_norm": null', 7))
    assert np.isnan(figure_of(folder).axes[2].lines[0].get_ydata()).sum() == 7
    (folder / "metrics.jsonl").write_text(text.replace('"grad_norm": 1.0', '"grad_norm": null'))
    assert [each.get_text() for each in figure_of(folder).axes[2].texts] == ["not logged"]


def test_a_killed_runs_broken_line_is_left_out(tmp_path):
    """And standard error says how many."""
    folder = make_run(tmp_path / "a")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "split": "tra')
    done = plot(folder)
    assert done.returncode == 0 and "best val loss 3.5000 at step 20" in done.stdout
    assert done.stderr == f"{folder}: 1 broken line of metrics.jsonl left out\n"


@pytest.mark.parametrize("content", [None, b"", b"- a list", b"model: {", b"\xff\xfe\x00"])
def test_without_its_settings_a_run_is_drawn_all_the_same(content, tmp_path):
    """Whatever is wrong with config.yaml."""
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", settings={"max_lr": 1.0})
    (a / "config.yaml").unlink()
    if content is not None:
        (a / "config.yaml").write_bytes(content)
    assert read_run(a)[1] == ["no settings in the legend, config.yaml is missing or broken"]
    assert labels([read_run(folder)[0] for folder in (a, b)])[0] == "a: best val loss 3.5000 at step 20"
    if content == b"- a list":
        done = plot(a, b)
        assert done.returncode == 0
        assert done.stderr == f"{a}: no settings in the legend, config.yaml is missing or broken\n"


def test_runs_without_losses_are_left_out(tmp_path):
    """The others are drawn, and one line names those; it is an error if none is left."""
    a, empty, bare, file = make_run(tmp_path / "a"), tmp_path / "empty", tmp_path / "bare", tmp_path / "file"
    empty.mkdir(), bare.mkdir()
    (empty / "metrics.jsonl").touch()
    file.touch()
    done = plot(bare, empty, a, file)
    assert done.returncode == 0 and done.stdout.startswith(f"{a}/plot.png | a: best")
    assert done.stderr == (f"left out, without losses: {bare}/metrics.jsonl, {empty}/metrics.jsonl, "
                           f"{file}/metrics.jsonl\n")
    assert_refused(plot(empty), f"no losses in {empty}/metrics.jsonl", "scripts.train")
    assert_refused(plot(bare, empty), f"{bare}/metrics.jsonl, {empty}/metrics.jsonl")
    (empty / "metrics.jsonl").write_text('{"step": 0, "split": "hellaswag", "acc": 0.5}\nnothing\n')
    assert_refused(plot(empty), f"no losses in {empty}/metrics.jsonl")


def test_mistakes_are_one_line(tmp_path):
    """They name the thing and its value, and nothing is written."""
    a = make_run(tmp_path / "a")
    before = sorted(a.iterdir())
    assert_refused(plot(a, tmp_path / "nope"), f"there is no folder '{tmp_path}/nope'", "log_dir of a run")
    assert_refused(plot(a, "--out", tmp_path / "nope" / "x.png"), "nope/x.png", f"there is no folder '{tmp_path}/nope'")
    assert_refused(plot(a, "--out", tmp_path / "x.docx"), "x.docx", ".png, .jpg, .pdf or .svg")
    assert_refused(plot(a, "--out", tmp_path / "x"), ".png, .jpg, .pdf or .svg")
    assert_flag_refused(plot(a, "--x", "epochs"), "--x", "epochs", "steps", "tokens")
    (tmp_path / "folder.png").mkdir()
    assert_refused(plot(a, "--out", tmp_path / "folder.png"), "folder.png", "directory")
    make_run(tmp_path / "b", steps=0)
    (tmp_path / "b" / "config.yaml").write_text("seed: 1")
    done = plot(a, tmp_path / "b", "--x", "tokens")
    assert_refused(done, f"the tokens of {tmp_path}/b are not known", "--x steps")
    assert sorted(a.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "folder.png"]


def test_a_missing_matplotlib_is_named(tmp_path):
    """With the command that installs it."""
    (tmp_path / "matplotlib.py").write_text("raise ImportError('no module')")
    done = subprocess.run([sys.executable, "-m", "scripts.plot", make_run(tmp_path / "a")], cwd=ROOT, text=True,
                          env={**environment(), "PYTHONPATH": str(tmp_path)}, capture_output=True)
    assert_refused(done, "matplotlib is not installed: pip install matplotlib")


def test_ctrl_c_leaves_the_old_picture(tmp_path, monkeypatch):
    """Pressed when half of the file is written."""
    def half(figure, file, **options):
        file.write(b"half")
        raise KeyboardInterrupt

    folder = make_run(tmp_path / "a")
    (folder / "plot.png").write_bytes(b"old")
    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(KeyboardInterrupt):
        main(PlotConfig([str(folder)]))
    assert (folder / "plot.png").read_bytes() == b"old"
    assert sorted(path.name for path in folder.iterdir()) == ["config.yaml", "metrics.jsonl", "plot.png"]
