"""scripts/train.py, as typed: what a run computes, prints and writes, and how later runs use it."""

import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt.config import GPTConfig
from gpt.dataloader import DataLoaderLite
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


def test_run_prints_and_writes_the_documented_lines_and_files(data_root, tmp_path):
    flags = "--max_steps 8 --eval_every 4 --save_every 4 --sample_every 4 --tensorboard"
    done = train(data_root, tmp_path, *flags.split())
    printed = r"8 steps take about .* at 30% MFU\n(?s:.*)\nstep 0 \| loss: 10\.8"
    assert re.search(printed, done.stdout)
    assert not done.stderr  # no progress bar without a terminal
    assert sorted(path.name for path in tmp_path.glob("[!e]*")) == [  # without events.out.*
        "config.yaml", "metrics.jsonl", "model_00000.pt", "model_00004.pt", "model_00008.pt",
        "model_best.pt", "optim_00004.pt", "optim_00008.pt", "samples.txt"]
    assert metrics(tmp_path, "start")[0].keys() == {
        "step", "split", "commit", "torch", "device", "ranks"}
    assert metrics(tmp_path, "train")[7].keys() == {
        "step", "split", "loss", "lr", "grad_norm", "tokens", "epoch"}
    val = metrics(tmp_path, "val")
    assert load_pt(tmp_path / "model_best.pt")["val_loss"] == min(val[4]["loss"], val[8]["loss"])
    _, event = EventAccumulator(str(tmp_path)).Reload().Scalars("val/bits_per_byte")
    assert event.value == pytest.approx(val[8]["bits_per_byte"])


def test_losses_equal_those_of_a_plain_pytorch_loop(byte_data, tmp_path):
    """One batch per step instead of two micro-steps, and full logits. The validation loss is the
    mean over the first 512 tokens."""
    flags = "--model.dropout 0 --grad_clip 0.8 --weight_decay 0 --warmup_steps 0 --min_lr_ratio 1"
    train(byte_data, tmp_path, *RUN, *flags.split())
    torch.manual_seed(1337)
    model = GPT(GPTConfig(block_size=32, vocab_size=256, n_layer=2, n_head=2, n_embd=16))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, betas=(0.9, 0.95), weight_decay=0)
    loader = DataLoaderLite(byte_data, "train", micro_batch_size=8, seq_len=32, vocab_size=256)
    for step, record in metrics(tmp_path, "train").items():
        x, y = loader.batch(step, 0)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.8)
        optimizer.step()
        optimizer.zero_grad()
        expected = pytest.approx([loss.item(), norm.item()], rel=1e-4)
        assert [record["loss"], record["grad_norm"]] == expected, step
    tokens = torch.from_numpy(np.load(byte_data / "val_00000.npy")[:513].astype(np.int64))
    loss = F.cross_entropy(model(tokens[:512].view(16, 32)).flatten(0, 1), tokens[1:])
    assert metrics(tmp_path, "val")[12]["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_config_yaml_repeats_the_run(uninterrupted_run, tmp_path):
    """--deterministic changes nothing on a CPU."""
    done = run("-m", "scripts.train", "--config", uninterrupted_run / "config.yaml", "--log_dir",
               tmp_path, "--deterministic")
    assert done.returncode == 0, done.stderr
    assert_same_results(uninterrupted_run, tmp_path)


def test_finished_run_is_unchanged_when_rerun(uninterrupted_run, byte_data):
    """A rerun prints that it is finished. No file changes, then or after an error."""
    def modified():
        return {path: path.stat().st_mtime_ns for path in uninterrupted_run.iterdir()}

    before = modified()
    done = train(byte_data, uninterrupted_run, *RUN)
    assert "the run is finished, step 12 of 12; raise --max_steps" in done.stdout
    done = train(byte_data, uninterrupted_run, *RUN, "--max_steps", 8, status=2)
    assert_user_error(done, "--max_steps is 8", "already at step 12")
    assert modified() == before


@pytest.mark.parametrize("name, value, old", [
    ("total_batch_size", 512, 256), ("seq_len", 64, 32), ("model.n_layer", 3, 2)])
def test_settings_that_define_a_step_cannot_change(uninterrupted_run, byte_data, name, value, old):
    done = train(byte_data, uninterrupted_run, *RUN, f"--{name}", value, status=2)
    assert_user_error(done, f"--{name} is {value}", f"trained with {old}: pass --{name} {old} to")


def test_resume_with_other_data_requires_init_from(uninterrupted_run, byte_data, tmp_path):
    """The new run starts at the old run's final loss, with any optimizer, and can be resumed."""
    data = shutil.copytree(byte_data, tmp_path / "data")
    shutil.copy(data / "train_00001.npy", data / "train_00000.npy")
    checkpoint = uninterrupted_run / "model_00012.pt"
    assert_user_error(train(data, uninterrupted_run, *RUN, status=2),
                      "train_00000.npy: was 20000 tokens",
                      f"start a new run with --init_from {checkpoint} --log_dir NEW")
    for max_steps in (1, 2):
        train(data, tmp_path, *RUN, "--init_from", checkpoint, "--optimizer", "muon",
              "--max_steps", max_steps)
    old, new = metrics(uninterrupted_run, "train"), metrics(tmp_path, "train")
    assert list(new) == [0, 1]
    assert new[0]["loss"] == pytest.approx(old[11]["loss"], abs=0.5)
    assert new[0]["loss"] < old[0]["loss"] - 1


def test_fp16_run_skips_updates_that_overflow(byte_data, tmp_path):
    """The loss scale is restored from the checkpoint. A skipped update is reported and changes no
    weight."""
    flags = "--precision fp16 --eval_every 0 --max_steps"
    args = [*TINY_BYTES, *flags.split()]
    train(byte_data, tmp_path, *args, 4)
    optim = load_pt(tmp_path / "optim_00004.pt")
    optim["scaler"]["scale"] = 2.0**40
    torch.save(optim, tmp_path / "optim_00004.pt")
    done = train(byte_data, tmp_path, *args, 5)
    skipped = "step 4: no update, the gradients overflow in fp16; loss scale now 5.49756e+11"
    assert skipped in done.stdout
    assert metrics(tmp_path, "train")[4]["grad_norm"] is None
    before, after = (load_pt(tmp_path / f"model_0000{step}.pt")["model"] for step in (4, 5))
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.slow
def test_compiled_ranks_train_like_eager_ones(data_root, tmp_path):
    """torch.compile (a minute on a CPU) changes the speed, not the losses; evaluation and sampling
    work with it."""
    losses = {}
    for value in ("true", "false"):
        flags = f"--max_steps 4 --eval_every 2 --sample_every 2 --compile {value}"
        for done in run_ranks(2, "-m", "scripts.train", "--data_root", data_root, *TINY,
                              "--log_dir", tmp_path / value, *flags.split()):
            assert done.returncode == 0, done.stderr
        losses[value] = [record["loss"] for split in ("train", "val")
                         for record in metrics(tmp_path / value, split).values()]
    assert losses["true"] == pytest.approx(losses["false"], abs=1e-4)
