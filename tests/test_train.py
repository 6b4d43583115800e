"""scripts/train.py, as typed: the loop, resume, signals, several processes."""

import fcntl
import math
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import termios
import time

import numpy as np
import pytest
import torch
import yaml

from gpt import checkpoint
from gpt.config import GPTConfig
from gpt.dataloader import DataLoaderLite
from gpt.device import select_precision
from gpt.files import load_pt
from gpt.model import GPT
from tests.conftest import (
    ROOT,
    TINY,
    TINY_BYTES,
    assert_refused,
    command,
    environment,
    metrics,
    run,
    start,
    train,
    workers,
)

STEPS = ["--max_steps", "20", "--eval_every", "5", "--save_every", "10", "--sample_every", "10"]


@pytest.fixture(scope="module")
def finished(data_root, tmp_path_factory):
    """A whole run, with dropout: its folder and what it printed."""
    log_dir = tmp_path_factory.mktemp("finished")
    return log_dir, train(data_root, log_dir, *STEPS, "--model.dropout", "0.1").stdout


def test_what_a_run_prints_and_leaves(finished):
    """Lines, files and keys that people and programs rely on."""
    log_dir, printed = finished
    lines = printed.splitlines()
    assert lines[:3] == ["found 2 shards for split train", "found 1 shards for split val", "using device: cpu"]
    assert re.search(r"^step 0 \| loss: 10\.8\d\d\d \| lr: 0\.002500 \| dt: \d+ms", printed, re.M)
    assert re.search(r"^val loss \d+\.\d{4}", printed, re.M)
    assert printed.count("--- sample at step") == 2
    assert sorted(p.name for p in log_dir.iterdir()) == [
        "config.yaml", "metrics.jsonl", "model_00000.pt", "model_00010.pt", "model_00020.pt", "model_best.pt",
        "optim_00010.pt", "optim_00020.pt", "samples.txt"]
    train_records, val = metrics(log_dir, "train"), metrics(log_dir, "val")
    assert list(train_records) == list(range(20)) and list(val) == [5, 10, 15, 20]
    assert train_records[19].keys() == {"step", "split", "loss", "lr", "grad_norm", "tokens", "epoch"}
    assert train_records[19]["tokens"] == 20 * 256
    assert val[20]["loss"] < train_records[0]["loss"] - 1  # it learns
    assert val[20]["perplexity"] == pytest.approx(math.exp(val[20]["loss"]))
    best = min(val.values(), key=lambda record: record["loss"])
    content = checkpoint.load_checkpoint(log_dir / "model_best.pt")
    assert (content["step"], content["val_loss"]) == (best["step"], best["loss"])
    content = checkpoint.load_checkpoint(log_dir / "model_00020.pt")
    assert content["tokenizer"] == "gpt2"
    assert content["train_config"] == yaml.safe_load((log_dir / "config.yaml").read_text())


def test_the_validation_loss_is_the_plain_mean(finished, data_root):
    """Over the first eval_tokens of the val split, by the plain formula on full logits."""
    log_dir, _ = finished
    model = GPT.from_checkpoint(checkpoint.load_checkpoint(log_dir / "model_00020.pt")).eval()
    tokens = torch.tensor(np.load(data_root / "val_00000.npy").astype(np.int64))[:513]
    with torch.no_grad():
        logits = model(tokens[:512].view(16, 32)).double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:])
    assert metrics(log_dir, "val")[20]["loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_the_first_update_is_the_plain_one(data_root, tmp_path):
    """Gradient accumulation over 4 micro-steps equals one batch through plain PyTorch: same loss and gradient norm."""
    train(data_root, tmp_path, "--max_steps", "1", "--eval_every", "0", "--sample_every", "0")
    torch.manual_seed(1337)
    model = GPT(GPTConfig(block_size=32, vocab_size=50257, n_layer=2, n_head=2, n_embd=16))
    x, y = DataLoaderLite(data_root, "train", micro_batch_size=8, seq_len=32, vocab_size=50257,
                          total_batch_size=256).batch(0, 0)
    loss = torch.nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
    loss.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    first = metrics(tmp_path, "train")[0]
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_resume_after_kill_repeats_the_same_losses(finished, data_root, tmp_path):
    """kill -9 between two checkpoints, then the same command: every number as if nothing had happened."""
    words = ["-m", "scripts.train", "--data_root", data_root, "--log_dir", tmp_path, *TINY, *STEPS,
             "--model.dropout", "0.1"]
    process = start(*words)
    for line in process.stdout:
        if line.startswith("step 12 "):
            process.kill()
    assert process.wait() == -signal.SIGKILL
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 17, "split": "tra')  # killed in the middle of a line
    again = run(*words)
    assert again.returncode == 0, again.stderr
    assert f"resuming from {tmp_path}/model_00010.pt at step 10 of 20\n" in again.stdout
    log_dir, _ = finished
    for split in ("train", "val"):
        assert metrics(tmp_path, split) == metrics(log_dir, split)
    assert_same_weights(tmp_path / "model_00020.pt", log_dir / "model_00020.pt")
    assert_same_weights(tmp_path / "model_best.pt", log_dir / "model_best.pt")


def assert_same_weights(one, other):
    """To the last bit."""
    one, other = checkpoint.load_checkpoint(one)["model"], checkpoint.load_checkpoint(other)["model"]
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_and_leaves(finished, data_root, tmp_path, signum, status):
    """The first one finishes the step and saves; going on gives what an undisturbed run gives."""
    words = ["-m", "scripts.train", "--data_root", data_root, "--log_dir", tmp_path, *TINY, *STEPS,
             "--model.dropout", "0.1"]
    process = start(*words, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # as without nohup
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("step 12 "):
            process.send_signal(signum)
    assert process.wait() == status, printed
    assert "Traceback" not in "".join(printed)
    stopped = re.search(r"stopped at step (\d+) of 20", printed[-1])
    assert stopped and (tmp_path / f"model_{int(stopped[1]):05d}.pt").exists()
    again = run(*words)
    assert again.returncode == 0 and f"at step {stopped[1]} of 20" in again.stdout
    log_dir, _ = finished
    for split in ("train", "val"):
        assert metrics(tmp_path, split) == metrics(log_dir, split)
    assert_same_weights(tmp_path / "model_00020.pt", log_dir / "model_00020.pt")


def test_a_second_signal_leaves_at_once(data_root, tmp_path):
    """In the middle of a step that takes seconds."""
    process = start("-m", "scripts.train", "--data_root", data_root, "--log_dir", tmp_path, *TINY,
                    "--total_batch_size", 256 * 60, "--eval_every", "0", "--sample_every", "0")
    for line in process.stdout:
        if line.startswith("step 0 "):
            process.send_signal(signal.SIGINT)
        if line.startswith("SIGINT: finishing"):
            process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == -signal.SIGINT  # a shell shows it as 130
    assert [p.name for p in tmp_path.glob("model_*")] == ["model_00000.pt"]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_in_the_first_step_leaves_at_once(data_root, tmp_path, ranks):
    """Which may be minutes of compiling, while a cluster kills after 30 s; what is there already is all there is."""
    torchrun = ["torchrun", "--standalone", "--nproc_per_node=2"] if ranks == 2 else []
    process = start(*torchrun, "-m", "scripts.train", "--data_root", data_root, "--log_dir", tmp_path, *TINY,
                    "--total_batch_size", 256 * 4000)
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("saved"):
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
    assert process.wait() == (143 if ranks == 1 else 1) and time.monotonic() - began < 15
    assert "".join(printed).count("SIGTERM: stopping before the first completed step") == 1
    assert checkpoint.load_latest(tmp_path, print, require_optim=True)[1]["step"] == 0
    assert metrics(tmp_path, "train") == {}


def test_two_processes_train_as_one_does(data_root, tmp_path):
    """torchrun with two gloo ranks, in both spellings, against one process: the same losses at every step."""
    words = ["--data_root", data_root, *TINY, "--max_steps", "4", "--eval_every", "2", "--sample_every", "2"]
    one = run("-m", "scripts.train", *words, "--log_dir", tmp_path / "one")
    script = run("torchrun", "--standalone", "--nproc_per_node=2", "scripts/train.py", *words,
                 "--log_dir", tmp_path / "script")
    module = run("torchrun", "--standalone", "--nproc_per_node=2", "-m", "scripts.train", *words,
                 "--micro_batch_size", "2", "--log_dir", tmp_path / "module")
    for done in (one, script, module):
        assert done.returncode == 0, done.stderr
    assert script.stdout.count("val loss") == 2  # rank 1 is silent
    for split, count in (("train", 4), ("val", 2)):
        alone = metrics(tmp_path / "one", split)
        assert len(alone) == count
        for folder in ("script", "module"):
            together = metrics(tmp_path / folder, split)
            assert together.keys() == alone.keys()
            for step, record in alone.items():
                assert together[step]["loss"] == pytest.approx(record["loss"], abs=1e-5)
    # … and one process goes on with what two have begun.
    longer = run("-m", "scripts.train", *words, "--max_steps", "6", "--log_dir", tmp_path / "script")
    assert longer.returncode == 0, longer.stderr
    assert "resuming" in longer.stdout and "max_steps 4 -> 6" in longer.stdout
    assert list(metrics(tmp_path / "script", "train")) == list(range(6))


def test_a_finished_run_says_so_and_can_go_on(finished, data_root):
    """A second `make train` must not train again, nor fail."""
    log_dir, _ = finished
    before = {path.name: path.stat().st_mtime_ns for path in log_dir.iterdir()}
    done = train(data_root, log_dir, *STEPS)
    assert "the run is finished, step 20 of 20; raise --max_steps" in done.stdout
    assert {path.name: path.stat().st_mtime_ns for path in log_dir.iterdir()} == before


def test_another_shape_is_refused_and_nothing_is_lost(finished, data_root):
    """With the differences listed; dropout is no difference."""
    log_dir, _ = finished
    before = {path.name: path.stat().st_mtime_ns for path in log_dir.iterdir()}
    done = run("-m", "scripts.train", "--data_root", data_root, "--log_dir", log_dir, *TINY, "--model.n_layer", "3",
               "--seq_len", "64", "--max_steps", "30")
    assert_refused(done, "another model config", "n_layer: checkpoint 2, requested 3",
                   "block_size: checkpoint 32, requested 64")
    assert "dropout" not in done.stderr
    other = run("-m", "scripts.train", "--data_root", data_root, "--log_dir", log_dir, *TINY, "--max_steps", "30",
                "--optimizer", "muon")
    assert_refused(other, "optimizer state of step 20 does not fit", "--optimizer")
    new = run("-m", "scripts.train", "--data_root", data_root, "--log_dir", log_dir, *TINY, "--max_steps", "30",
              "--init_from", log_dir / "model_00010.pt")
    assert_refused(new, "a run with --init_from scratch", "another --log_dir")
    assert {path.name: path.stat().st_mtime_ns for path in log_dir.iterdir()} == before


def test_resuming_on_other_data_is_refused(byte_data, tmp_path):
    """By the name of the shard; the command that the message gives begins a new run from the weights."""
    shutil.copytree(byte_data, tmp_path / "data")
    words = ["-m", "scripts.train", "--data_root", tmp_path / "data", *TINY_BYTES, "--sample_every", "0"]
    assert run(*words, "--log_dir", tmp_path / "log", "--max_steps", "1").returncode == 0
    shutil.copy(tmp_path / "data" / "train_00001.npy", tmp_path / "data" / "train_00000.npy")
    done = run(*words, "--log_dir", tmp_path / "log", "--max_steps", "2")
    assert_refused(done, "train_00000.npy: was 20000 tokens", f"--init_from {tmp_path}/log/model_00001.pt --log_dir")
    again = run(*words, "--log_dir", tmp_path / "new", "--max_steps", "1", "--init_from",
                tmp_path / "log" / "model_00001.pt")
    assert again.returncode == 0, again.stderr


def test_a_failed_evaluation_loses_nothing(byte_data, tmp_path, monkeypatch):
    """The run resumes from that very step, although no checkpoint was due, and evaluates it then."""
    monkeypatch.setenv("FAULT", "evaluation")
    words = ["--data_root", byte_data, "--log_dir", tmp_path / "log", *TINY_BYTES, "--sample_every", "0",
             "--max_steps", "6", "--eval_every", "3", "--save_every", "100"]
    failed = run("tests/fault_injection.py", *words)
    assert failed.returncode == 1 and "evaluation failed" in failed.stderr and "model_00003.pt" in failed.stdout
    assert list(metrics(tmp_path / "log", "train")) == [0, 1, 2]
    done = run("-m", "scripts.train", *words)
    assert done.returncode == 0 and "model_00003.pt at step 3 of 6" in done.stdout
    whole = run("-m", "scripts.train", *words, "--log_dir", tmp_path / "whole")
    assert whole.returncode == 0
    for split in ("train", "val"):
        assert metrics(tmp_path / "log", split) == metrics(tmp_path / "whole", split)


def test_init_from_starts_a_new_run_with_old_weights(finished, data_root, tmp_path):
    """The new run begins as good as the old one ended, whatever shape the command line says."""
    log_dir, _ = finished
    train(data_root, tmp_path, "--max_steps", "1", "--eval_every", "1", "--init_from", log_dir / "model_00020.pt",
          "--model.n_layer", "7", "--seq_len", "16", "--sample_every", "0", "--optimizer", "muon")
    assert metrics(tmp_path, "train")[0]["loss"] == pytest.approx(metrics(log_dir, "train")[19]["loss"], abs=0.5)
    assert checkpoint.load_checkpoint(tmp_path / "model_00001.pt")["config"]["n_layer"] == 2


@pytest.mark.parametrize("words, what", [(["--max_steps", "9", "--eval_every", "0"], "step 1: loss nan"),
                                         (["--max_steps", "9", "--eval_every", "0", "--save_every", "1"],
                                          "step 1: norm of the weights inf"),
                                         (["--max_steps", "1"], "next loss nan")])
def test_divergence_stops_and_spares_the_checkpoints(data_root, tmp_path, words, what):
    """Ruined by the first update: the step, advice, and nothing saved or logged of it."""
    done = run("-m", "scripts.train", "--data_root", data_root, "--log_dir", tmp_path, *TINY, *words,
               "--max_lr", "1e30", "--warmup_steps", "0", "--grad_clip", "0")
    assert_refused(done, what, "has diverged", f"resumes from {tmp_path}/model_00000.pt", "lower --max_lr")
    assert [path.name for path in tmp_path.glob("model_*.pt")] == ["model_00000.pt"]
    assert list(metrics(tmp_path, "train")) == [0] and metrics(tmp_path, "val") == {}


def test_config_file_flags_and_saved_config(data_root, tmp_path):
    """Flags override the file, wherever they stand; log/config.yaml repeats the run."""
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump({
        "data_root": str(data_root), "log_dir": str(tmp_path / "a"), "max_steps": 2, "eval_every": 0,
        "sample_every": 0, "seq_len": 32, "micro_batch_size": 4, "total_batch_size": 128, "device": "cpu",
        "model": {"n_layer": 1, "n_head": 1, "n_embd": 8}}))
    first = run("-m", "scripts.train", "--max_steps", "1", "--config", config, "--model.n_head", "2")
    assert first.returncode == 0, first.stderr
    written = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert (written["max_steps"], written["model"]["n_head"], written["model"]["n_embd"]) == (1, 2, 8)
    again = run("-m", "scripts.train", "--config", tmp_path / "a" / "config.yaml", "--log_dir", tmp_path / "b")
    assert again.returncode == 0, again.stderr
    assert metrics(tmp_path / "a", "train") == metrics(tmp_path / "b", "train")


def test_the_bar_on_a_terminal(data_root, tmp_path):
    """A person at a terminal sees one bar with loss, speed and time left, and no line for every step."""
    words = command("-m", "scripts.train", "--data_root", str(data_root), *TINY, "--max_steps", "3",
                    "--eval_every", "2", "--sample_every", "0", "--log_dir")
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))  # lines, columns
    subprocess.run([*words, tmp_path / "terminal"], cwd=ROOT, env=environment(), check=True, stdout=follower,
                   stderr=follower)
    shown = os.read(leader, 1 << 16).decode()
    assert re.search(r"3/3 \[.*loss \d+\.\d+, val \d+\.\d+, [\d,]+ tokens/s", shown)
    assert re.search(r"\rval loss \d+\.\d+ \| step: 2", shown) and "step 1 |" not in shown
    plain = subprocess.run([*words, tmp_path / "plain"], cwd=ROOT, env=environment(), check=True, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT).stdout
    assert "step 1 |" in plain and "\r" not in plain and "\x1b" not in plain


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains_and_resumes(data_root, tmp_path, precision):
    """Autocast, with two optimizers: resuming repeats every loss; the fp16 gradient scaler's state comes back too."""
    words = ["--precision", precision, "--optimizer", "muon", "--warmup_steps", "0", "--min_lr_ratio", "1",
             "--eval_every", "3", "--sample_every", "0"]
    train(data_root, tmp_path / "whole", *words, "--max_steps", "6")
    assert metrics(tmp_path / "whole", "val")[6]["loss"] < metrics(tmp_path / "whole", "train")[0]["loss"] - 0.3
    scaler = load_pt(tmp_path / "whole" / "optim_00006.pt")["scaler"]
    assert bool(scaler) == (precision == "fp16")
    train(data_root, tmp_path / "halves", *words, "--max_steps", "3")
    train(data_root, tmp_path / "halves", *words, "--max_steps", "6")
    for split in ("train", "val"):
        assert metrics(tmp_path / "halves", split) == metrics(tmp_path / "whole", split)


def test_auto_precision_is_decided_once(byte_data, tmp_path):
    """config.yaml holds the decision, and a resume on a machine that decides otherwise says so."""
    quiet = ["--model.vocab_size", "256", "--sample_every", "0", "--eval_every", "0"]
    decided = select_precision("auto", torch.device("cpu"))
    done = train(byte_data, tmp_path, *quiet, "--precision", "auto", "--max_steps", "1")
    assert f"parameters, {decided}, " in done.stdout
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert settings["precision"] == decided and settings["compile"] is False
    other = {"bf16": "float32", "float32": "bf16"}[decided]
    done = train(byte_data, tmp_path, *quiet, "--precision", other, "--max_steps", "2")
    assert f"changed: max_steps 1 -> 2; precision {decided} -> {other}" in done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="limits of memory are Unix's")
def test_out_of_memory_names_the_next_smaller_micro_batch(data_root, tmp_path):
    """65,536 sequences do not fit into 8 GB; of the 131,072 of a step a third would not divide."""
    words = ["-m", "scripts.train", "--data_root", data_root, "--log_dir", tmp_path, *TINY, "--model.n_embd", "256",
             "--micro_batch_size", "65536", "--total_batch_size", str(2 * 65536 * 32), "--eval_every", "0",
             "--sample_every", "0"]
    limited = ["bash", "-c", 'ulimit -v 8000000; exec "$@"', "bash", *command(*map(str, words))]
    done = subprocess.run(limited, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert_refused(done, "--micro_batch_size 65536", "pass --micro_batch_size 32768")
    assert not list(tmp_path.glob("*.pt"))


def test_a_skipped_update_is_said(byte_data, tmp_path):
    """Where gradients overflow in fp16 the scaler skips the update: in the log as well, not only in the weights."""
    words = ["--model.vocab_size", "256", "--precision", "fp16", "--sample_every", "0", "--eval_every", "0"]
    train(byte_data, tmp_path, *words, "--max_steps", "1")
    optim = load_pt(tmp_path / "optim_00001.pt")
    optim["scaler"]["scale"] = 2.0**40
    torch.save(optim, tmp_path / "optim_00001.pt")
    done = train(byte_data, tmp_path, *words, "--max_steps", "2")
    assert "step 1: no update, the gradients overflow in fp16; loss scale now 5.49756e+11" in done.stdout
    assert metrics(tmp_path, "train")[1]["grad_norm"] is None
    before, after = (checkpoint.load_checkpoint(tmp_path / f"model_0000{step}.pt")["model"] for step in (1, 2))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("target", ["torchrun", "a worker"])
def test_sigterm_under_torchrun_saves_once(data_root, tmp_path, target):
    """A preempted job: all ranks stop at the same step, and the checkpoint is there; rank 1 alone is enough."""
    words = ["torchrun", "--standalone", "--nproc_per_node=2", "-m", "scripts.train", "--data_root", data_root,
             "--log_dir", tmp_path, *TINY, "--max_steps", "100000", "--eval_every", "0", "--sample_every", "0"]
    process = start(*words)
    printed = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith("step 5 "):
            os.kill(process.pid if target == "torchrun" else workers(process.pid)[1], signal.SIGTERM)
    assert process.wait(timeout=60) != 0
    stopped = [int(number) for number in re.findall(r"stopped at step (\d+) of", "".join(printed))]
    assert len(stopped) == 1, "".join(printed)
    assert checkpoint.load_latest(tmp_path, print, require_optim=True)[1]["step"] == stopped[0]
    assert list(metrics(tmp_path, "train")) == list(range(stopped[0]))


@pytest.mark.slow
@pytest.mark.parametrize("precision, tolerance", [("float32", 1e-4), ("bf16", 1e-2)])
def test_a_compiled_model_trains_the_same(data_root, tmp_path, precision, tolerance):
    """torch.compile (a minute on a CPU) changes the speed, not the losses; evaluation and sampling work with it."""
    words = ["--max_steps", "4", "--eval_every", "2", "--sample_every", "2", "--precision", precision]
    train(data_root, tmp_path / "plain", *words)
    train(data_root, tmp_path / "compiled", *words, "--compile", "true")
    for split in ("train", "val"):
        plain, compiled = metrics(tmp_path / "plain", split), metrics(tmp_path / "compiled", split)
        assert plain.keys() == compiled.keys()
        for step, record in plain.items():
            assert compiled[step]["loss"] == pytest.approx(record["loss"], abs=tolerance)


def test_seq_len_auto_takes_what_a_short_text_has_room_for(tmp_path):
    """Half a page of validation text must do; a last shard without room for a window is left out."""
    tokens = (np.arange(1000) % 50).astype(np.uint16)
    for name, count in (("train_00000", 600), ("train_00001", 5), ("val_00000", 100)):
        np.save(tmp_path / f"{name}.npy", tokens[:count])
    train(tmp_path, tmp_path / "log", "--seq_len", "auto", "--max_steps", "2", "--sample_every", "0")
    assert yaml.safe_load((tmp_path / "log" / "config.yaml").read_text())["seq_len"] == 64
    content = checkpoint.load_checkpoint(tmp_path / "log" / "model_00002.pt")
    assert content["config"]["block_size"] == 64 and list(content["data"]) == [
        "train_00000.npy", "train_00001.npy", "val_00000.npy"]
