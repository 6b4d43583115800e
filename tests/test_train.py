"""scripts/train.py, as typed: what a run computes, prints and writes, and how later runs use it."""

import copy
import math
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from gpt.checkpoint import Checkpoint, assert_same_settings
from gpt.config import GPTConfig
from gpt.dataloader import DataLoaderLite
from gpt.errors import UserError
from gpt.files import load_pt
from gpt.model import GPT
from tests.conftest import (
    RUN,
    TINY,
    TINY_BYTES,
    assert_same_results,
    assert_user_error,
    metrics,
    run,
    run_ranks,
    train,
)


@pytest.fixture(scope="module")
def finished(data_root, tmp_path_factory):
    """Return the folder and the output of a run on GPT-2's tokens, with dropout and samples."""
    log_dir = tmp_path_factory.mktemp("finished")
    done = train(data_root, log_dir, "--max_steps", 8, "--eval_every", 4, "--save_every", 4,
                 "--sample_every", 4, "--sample_prompts", "ROMEO:", "JULIET:",
                 "--model.dropout", 0.1)
    return log_dir, done


def test_run_prints_and_writes_the_documented_lines_and_files(finished):
    log_dir, done = finished
    assert done.stdout.splitlines()[:3] == [
        "found 2 shards for split train", "found 1 shards for split val", "using device: cpu"]
    step_line = r"^step 0 \| loss: 10\.8\d\d\d \| lr: 0\.002500 \| dt: \d+ms"
    assert re.search(step_line, done.stdout, re.M)
    assert re.findall(r"^val loss \d+\.\d{4} \| step: (\d)", done.stdout, re.M) == ["4", "8"]
    assert f"\nsaved {log_dir}/model_00004.pt\n" in done.stdout
    assert not done.stderr
    assert "\r" not in done.stdout and "\x1b" not in done.stdout  # no progress bar in a pipe
    assert sorted(path.name for path in log_dir.iterdir()) == [
        "config.yaml", "metrics.jsonl", "model_00000.pt", "model_00004.pt", "model_00008.pt",
        "model_best.pt", "optim_00004.pt", "optim_00008.pt", "samples.txt"]
    samples = (log_dir / "samples.txt").read_text()
    assert re.findall(r"^--- sample at step (\d) ---\n(\w+:)", samples, re.M) == [
        ("4", "ROMEO:"), ("4", "JULIET:"), ("8", "ROMEO:"), ("8", "JULIET:")]
    assert all(text in done.stdout for text in samples.split("\n\n"))


def test_metrics_and_checkpoints_have_their_keys(finished):
    log_dir, _ = finished
    records, val = metrics(log_dir, "train"), metrics(log_dir, "val")
    assert list(records) == list(range(8)) and list(val) == [4, 8]
    assert records[7].keys() == {"step", "split", "loss", "lr", "grad_norm", "tokens", "epoch"}
    assert records[7]["tokens"] == 8 * 256
    assert val[8]["perplexity"] == pytest.approx(math.exp(val[8]["loss"]))
    last, best = torch.load(log_dir / "model_00008.pt"), torch.load(log_dir / "model_best.pt")
    assert (last["step"], last["tokenizer"]) == (8, "gpt2")
    settings = last["train_config"] | {"betas": list(last["train_config"]["betas"])}
    assert settings == yaml.safe_load((log_dir / "config.yaml").read_text())
    lowest = min((record["loss"], step) for step, record in val.items())
    assert lowest == (best["val_loss"], best["step"])


def test_validation_loss_is_the_mean_over_the_first_tokens(finished, data_root):
    """Without dropout, each of the 512 tokens once; recomputed from the checkpoint with full
    logits."""
    log_dir, _ = finished
    content = torch.load(log_dir / "model_00008.pt")
    model = GPT(GPTConfig(**content["config"])).eval()
    model.load_state_dict(content["model"])
    tokens = torch.from_numpy(np.load(data_root / "val_00000.npy")[:513].astype(np.int64))
    with torch.no_grad():
        logits = model(tokens[:512].view(16, 32)).double()
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[1:])
    assert metrics(log_dir, "val")[8]["loss"] == pytest.approx(expected.item(), rel=1e-6)


def test_training_equals_a_plain_pytorch_loop(byte_data, tmp_path):
    """One batch per step instead of two micro-steps, full logits, and the schedule by its
    formula."""
    train(byte_data, tmp_path, *RUN, "--model.dropout", 0, "--grad_clip", 0.8)
    torch.manual_seed(1337)
    model = GPT(GPTConfig(block_size=32, vocab_size=256, n_layer=2, n_head=2, n_embd=16))
    groups = [{"params": [p for p in model.parameters() if p.dim() > 1]},
              {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1)
    loader = DataLoaderLite(byte_data, "train", micro_batch_size=8, seq_len=32, vocab_size=256,
                            total_batch_size=256)
    for step in range(12):
        lr = 1e-2 * (step + 1) / 4
        if step >= 4:
            lr = 1e-3 + 9e-3 * (1 + math.cos(math.pi * (step - 4) / 8)) / 2
        x, y = loader.batch(step, 0)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.8)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        record = metrics(tmp_path, "train")[step]
        assert (record["loss"], record["grad_norm"], record["lr"]) == pytest.approx(
            (loss.item(), norm.item(), lr), rel=1e-4), step
    trained = torch.load(tmp_path / "model_00012.pt")["model"]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=0, atol=2e-5, msg=name)


def test_config_yaml_repeats_the_run(uninterrupted_run, tmp_path):
    done = run("-m", "scripts.train", "--config", uninterrupted_run / "config.yaml", "--log_dir",
               tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_results(uninterrupted_run, tmp_path)


def test_finished_run_is_unchanged_when_rerun(uninterrupted_run, byte_data):
    """A rerun prints that it is finished. No file changes, then or after an error."""
    before = {path.name: path.stat().st_mtime_ns for path in uninterrupted_run.iterdir()}
    args = ["-m", "scripts.train", "--data_root", byte_data, "--log_dir", uninterrupted_run, *RUN]
    assert "the run is finished, step 12 of 12; raise --max_steps" in run(*args).stdout
    assert_user_error(run(*args, "--max_steps", "8"), "--max_steps is 8", "already at step 12")
    after = {path.name: path.stat().st_mtime_ns for path in uninterrupted_run.iterdir()}
    assert after == before


@pytest.mark.parametrize("name, value, old", [
    ("total_batch_size", 512, 256), ("seq_len", 64, 32), ("seed", 7, 1337),
    ("model.n_layer", 3, 2), ("init_from", "gpt2", "scratch"), ("overfit_one_batch", True, False)])
def test_settings_that_define_a_step_cannot_change(uninterrupted_run, name, value, old):
    path = uninterrupted_run / "model_00012.pt"
    latest = Checkpoint(path, load_pt(path), {})
    settings = copy.deepcopy(latest.model["train_config"])
    assert_same_settings(latest, settings)
    *groups, key = name.split(".")
    (settings[groups[0]] if groups else settings)[key] = value
    with pytest.raises(UserError, match=f"--{name} is {value}, but {path} was trained with {old}: "
                                        f"pass --{name} {old} to resume, or another --log_dir"):
        assert_same_settings(latest, settings)


def test_resume_with_other_data_requires_init_from(uninterrupted_run, byte_data, tmp_path):
    """The new run starts at the old run's final loss, with the checkpoint's model config and any
    optimizer, and can be resumed."""
    data = shutil.copytree(byte_data, tmp_path / "data")
    log_dir = shutil.copytree(uninterrupted_run, tmp_path / "log")
    shutil.copy(data / "train_00001.npy", data / "train_00000.npy")
    args = ["-m", "scripts.train", "--data_root", data, *RUN]
    init_from = ["--init_from", log_dir / "model_00012.pt", "--log_dir"]
    assert_user_error(run(*args, "--log_dir", log_dir), "train_00000.npy: was 20000 tokens",
                      f"start a new run with {' '.join(map(str, init_from))} NEW")
    args += [*init_from, tmp_path / "new", "--seq_len", 16, "--optimizer", "muon"]
    for max_steps in (6, 12):
        done = run(*args, "--max_steps", max_steps)
        assert done.returncode == 0, done.stderr
    old, new = (metrics(folder, "train") for folder in (log_dir, tmp_path / "new"))
    assert new[0]["loss"] == pytest.approx(old[11]["loss"], abs=0.5)
    assert old[0]["loss"] > old[11]["loss"] + 1 and list(new) == list(range(12))
    assert torch.load(tmp_path / "new" / "model_00012.pt")["config"]["block_size"] == 32


def test_fp16_run_resumes_exactly_and_skips_updates_that_overflow(byte_data, tmp_path):
    """With Muon, and only one half has validation. A skipped update is reported and changes no
    weight."""
    args = [*TINY_BYTES, "--precision", "fp16", "--optimizer", "muon", "--warmup_steps", 0,
            "--min_lr_ratio", 1, "--sample_every", 0]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(byte_data, whole, *args, "--max_steps", 4, "--eval_every", 0)
    train(byte_data, parts, *args, "--max_steps", 2, "--eval_every", 2)
    train(byte_data, parts, *args, "--max_steps", 4, "--eval_every", 0)
    assert metrics(parts, "train") == metrics(whole, "train")
    optim = torch.load(parts / "optim_00004.pt")
    assert optim["scaler"] == torch.load(whole / "optim_00004.pt")["scaler"] != {}
    optim["scaler"]["scale"] = 2.0**40
    torch.save(optim, parts / "optim_00004.pt")
    done = train(byte_data, parts, *args, "--max_steps", 5, "--eval_every", 0)
    skipped = "step 4: no update, the gradients overflow in fp16; loss scale now 5.49756e+11"
    assert skipped in done.stdout
    assert metrics(parts, "train")[4]["grad_norm"] is None
    before, after = (torch.load(parts / f"model_0000{step}.pt")["model"] for step in (4, 5))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.slow
def test_compiled_ranks_train_like_eager_ones(data_root, tmp_path):
    """torch.compile (a minute on a CPU) changes the speed, not the losses; evaluation and sampling
    work with it."""
    args = ["-m", "scripts.train", "--data_root", data_root, *TINY, "--max_steps", 4,
            "--eval_every", 2, "--sample_every", 2]
    for value in ("true", "false"):
        for done in run_ranks(2, *args, "--log_dir", tmp_path / value, "--compile", value):
            assert done.returncode == 0, done.stderr
    for split in ("train", "val"):
        compiled, expected = (
            {step: record["loss"] for step, record in metrics(tmp_path / value, split).items()}
            for value in ("true", "false"))
        assert compiled == pytest.approx(expected, abs=1e-4)
