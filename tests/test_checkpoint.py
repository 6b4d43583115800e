"""gpt/checkpoint.py and gpt/files.py: saves are atomic, and loads are verified."""

import contextlib
import os
import random
import shutil
import zipfile

import pytest
import torch

from gpt.checkpoint import (
    CheckpointConfig,
    CheckpointManager,
    find_checkpoint,
    load_checkpoint,
    load_latest,
    load_optimizer,
)
from gpt.config import GPTConfig
from gpt.distributed import Ranks
from gpt.errors import UserError
from gpt.files import load_pt
from gpt.model import GPT
from gpt.optim import configure_optimizer


def make_manager(log_dir, weight_decay=0.1):
    """Return the CheckpointManager of a model after one optimizer step."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=30, n_layer=1, n_head=1, n_embd=8))
    optimizer = configure_optimizer(model, "adamw", lr=1e-3, weight_decay=weight_decay,
                                    betas=(0.9, 0.95))
    idx = torch.randint(30, (2, 8))
    model(idx, idx).backward()
    optimizer.step()
    return CheckpointManager(log_dir, Ranks(0, 1, torch.device("cpu")), lambda: None, model,
                             optimizer, torch.amp.GradScaler("cpu", enabled=False),
                             metadata={})


@pytest.fixture
def log_dir(tmp_path):
    """Return a log_dir with checkpoints of steps 4 and 8."""
    manager = make_manager(tmp_path)
    manager.save(4)
    manager.save(8)
    return tmp_path


def test_load_latest_returns_the_newest_step(tmp_path):
    """It ignores model_best.pt. A missing optimizer file matters only to a run that resumes, which
    must not start over by accident."""
    manager = make_manager(tmp_path)
    manager.save(99_999)
    manager.save(100_000)
    manager.save_best(100_001, val_loss=1.0)
    latest = load_latest(tmp_path, pytest.fail, with_optim=True)
    assert latest.model["step"] == latest.optim["step"] == 100_000
    for path in tmp_path.glob("optim_*.pt"):
        path.unlink()
    assert load_checkpoint(tmp_path)["step"] == 100_000
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        load_latest(tmp_path, print, with_optim=True)


def test_find_checkpoint_mentions_a_better_one(log_dir, capsys):
    """Commands take the newest checkpoint, which can be worse than model_best.pt."""
    records = ['{"split": "val", "step": 4, "loss": 2}', '{"split": "val", "step": 8, "loss": 3}']
    (log_dir / "metrics.jsonl").write_text("\n".join(records))
    shutil.copy(log_dir / "model_00004.pt", log_dir / "model_best.pt")
    find_checkpoint(CheckpointConfig(log_dir=str(log_dir)))
    printed = capsys.readouterr().err
    assert f"{log_dir}/model_best.pt: step 4 had a lower validation loss, 2.0000\n" in printed


class Code:
    """A pickle that creates a folder if it is loaded with weights_only=False."""

    def __reduce__(self):
        return os.mkdir, ("code_was_run",)


@pytest.mark.parametrize("name, content, message", [
    ("model_00008.pt", {"model": Code()}, "is damaged"),
    ("model_00008.pt", [1, 2], "holds a list"),
    ("model_00008.pt", {"state": 1}, "has no valid model"),
    ("model_00008.pt", {"model": {}, "config": {"layers": 1}, "step": 8}, "invalid config"),
    ("optim_00008.pt", {"step": 4}, "optim_00008.pt is 4")])
def test_load_latest_skips_and_names_unusable_checkpoints(log_dir, monkeypatch, name, content,
                                                          message):
    """The older one is returned, and no code runs."""
    monkeypatch.chdir(log_dir)
    torch.save(content, name)
    printed = []
    latest = load_latest(log_dir, printed.append, with_optim=True)
    assert latest.path.name == "model_00004.pt"
    [line] = printed
    assert line.startswith("skipping model_00008.pt: ") and message in line
    assert not os.path.exists("code_was_run")


def test_load_pt_never_returns_wrong_content_of_damaged_file(log_dir):
    """Cut off at one of 100 places, or a bit flipped there: an error, or no change if only padding
    was hit."""
    path, rng = log_dir / "optim_00008.pt", random.Random(0)
    whole, content = path.read_bytes(), load_pt(path)
    for at in rng.sample(range(len(whole)), 100):
        flipped = bytes([whole[at] ^ 1 << rng.randrange(8)])
        for damaged in (whole[:at], whole[:at] + flipped + whole[at + 1:]):
            path.write_bytes(damaged)
            with contextlib.suppress(UserError):
                torch.testing.assert_close(load_pt(path), content, rtol=0, atol=0)


@pytest.mark.parametrize("name, value", [
    ("compress_type", zipfile.ZIP_DEFLATED), ("external_attr", 0x10)])
def test_load_pt_refuses_what_torch_save_never_writes(tmp_path, name, value):
    """Compressed, a few megabytes could unpack to gigabytes; of an entry marked as a folder
    torch.load returns uninitialized memory."""
    entry = zipfile.ZipInfo("data.pkl")
    setattr(entry, name, value)
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr(entry, "To be")
    with pytest.raises(UserError, match="bad entry data.pkl"):
        load_pt(tmp_path / "model.pt")


@pytest.mark.parametrize("weight", [
    torch.zeros(30, 9), torch.zeros(30, 8).to_sparse(), torch.zeros(30, 8, dtype=torch.int64)])
def test_from_checkpoint_refuses_other_weights(log_dir, weight):
    content = load_pt(log_dir / "model_00008.pt")
    content["model"]["wte.weight"] = weight
    with pytest.raises(UserError, match="wte.weight is .*, expected .*30, 8"):
        GPT.from_checkpoint(content)


def test_from_checkpoint_copies_the_weights(log_dir):
    """Training must not write beyond the end of a tensor that the file holds with fewer values than
    its shape has."""
    content = load_pt(log_dir / "model_00008.pt")
    content["model"]["wte.weight"] = torch.ones(1, requires_grad=True).expand(30, 8)
    weight = GPT.from_checkpoint(content).wte.weight
    assert weight.is_contiguous() and torch.equal(weight, torch.ones(30, 8))


def test_load_optimizer_keeps_the_settings_of_the_command_line(log_dir):
    manager = make_manager(log_dir, weight_decay=0.7)
    load_optimizer(load_pt(log_dir / "optim_00008.pt"), manager.optimizer, manager.scaler)
    assert manager.optimizer.param_groups[0]["weight_decay"] == 0.7


@pytest.mark.parametrize("exp_avg", [
    None, torch.zeros(1), torch.zeros(1).expand(30, 8), torch.zeros(30, 8).half()])
def test_load_optimizer_refuses_state_that_does_not_fit(log_dir, exp_avg):
    """PyTorch accepts it, and its fused optimizers then write beyond the end of the tensors."""
    manager = make_manager(log_dir)
    optim = load_pt(log_dir / "optim_00008.pt")
    state = optim["optimizer"]["state"]
    if exp_avg is None:
        state.clear()
    else:
        state[0]["exp_avg"] = exp_avg
    with pytest.raises(UserError, match="optimizer state of step 8 does not match"):
        load_optimizer(optim, manager.optimizer, manager.scaler)
