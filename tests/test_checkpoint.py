"""gpt/checkpoint.py and gpt/files.py: saves are atomic, and loads are verified."""

import os
import random
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from gpt import checkpoint
from gpt.checkpoint import CheckpointManager
from gpt.config import GPTConfig
from gpt.distributed import Ranks
from gpt.errors import UserError
from gpt.files import atomic_write, load_pt
from gpt.model import GPT
from gpt.optim import configure_optimizer

SETTINGS = dict(lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))


def make_manager(log_dir, optimizer="adamw", n_embd=8):
    """Return the CheckpointManager of a model after one optimizer step."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=30, n_layer=1, n_head=1, n_embd=n_embd))
    optimizer = configure_optimizer(model, optimizer, **SETTINGS)
    idx = torch.randint(30, (2, 8))
    model(idx, idx).backward()
    optimizer.step()
    metadata = {"tokenizer": "gpt2", "train_config": {"max_steps": 9, "data_root": "mine"},
                "data": {"train_00000.npy": "9 tokens, hash a"}}
    return CheckpointManager(Path(log_dir), Ranks(0, 1, torch.device("cpu")), lambda: None, model,
                             optimizer, torch.amp.GradScaler("cpu", enabled=False), metadata)


def save(manager, step):
    """Save the model with weights that depend on `step`."""
    with torch.no_grad():
        manager.model.ln_f.bias.fill_(step)
    manager.save(step, required=True)


def load_latest(log_dir):
    """Return the newest checkpoint that a run can resume from, and the messages about newer
    ones."""
    printed = []
    return *checkpoint.load_latest(log_dir, printed.append, with_optim=True), " ".join(printed)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a log_dir with checkpoints of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("saved")
    manager = make_manager(folder)
    save(manager, 4)
    save(manager, 8)
    return folder


@pytest.fixture
def log_dir(saved, tmp_path):
    """Return a copy of `saved` for a test to damage."""
    return shutil.copytree(saved, tmp_path / "log")


def is_same(one, other):
    """Return whether nested dictionaries and lists of tensors and plain values are equal to the
    last bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(is_same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_load_latest_returns_the_newest_step(tmp_path):
    """It ignores model_best.pt. Saving keeps the two newest optimizer files, and files with other
    names."""
    assert checkpoint.load_latest(tmp_path, pytest.fail) is None
    (tmp_path / "optim_mine.pt").touch()
    manager = make_manager(tmp_path)
    for step in (0, 50, 100, 1000):
        save(manager, step)
    manager.save_best(1000, val_loss=1.0)
    assert sorted(path.name for path in tmp_path.glob("optim_*.pt")) == [
        "optim_00100.pt", "optim_01000.pt", "optim_mine.pt"]
    path, model, optim, printed = load_latest(tmp_path)
    assert (path.name, model["step"], optim["step"]) == ("model_01000.pt", 1000, 1000)
    assert not printed
    for path in tmp_path.glob("optim_*.pt"):
        path.unlink()
    with pytest.raises(UserError, match="none of the 4 checkpoints .*or move them away"):
        load_latest(tmp_path)
    newest, _, _ = checkpoint.load_latest(tmp_path, pytest.fail)  # enough to generate from
    assert newest.name == "model_01000.pt"


class Code:
    """A pickle that creates a folder if it is loaded with weights_only=False."""

    def __reduce__(self):
        return os.mkdir, ("code_was_run",)


@pytest.mark.parametrize("name, content, message", [
    ("model_00008.pt", b"To be", "is damaged"),
    ("model_00008.pt", {"model": Code()}, r"is damaged or not a \.pt file \(Weights only load"),
    ("model_00008.pt", [1, 2], "holds a list"),
    ("model_00008.pt", {"state": 1}, "has no valid model"),
    ("model_00008.pt", {"model": {}, "config": {"layers": 1}, "step": 8}, "invalid config"),
    ("model_00008.pt", "model_00004.pt", "the step in .*model_00008.pt is 4"),
    ("optim_00008.pt", b"", "optim_00008.pt is damaged"),
    ("optim_00008.pt", None, "optim_00008.pt is missing"),
    ("optim_00008.pt", "optim_00004.pt", "the step in .*optim_00008.pt is 4")])
def test_load_latest_skips_and_names_unusable_checkpoint(saved, log_dir, tmp_path, monkeypatch,
                                                         name, content, message):
    """The older one is returned; no code runs. content: bytes, an object to save, a file to copy;
    None: no file."""
    monkeypatch.chdir(tmp_path)
    if content is None:
        (log_dir / name).unlink()
    elif isinstance(content, str):
        shutil.copy(log_dir / content, log_dir / name)
    elif isinstance(content, bytes):
        (log_dir / name).write_bytes(content)
    else:
        torch.save(content, log_dir / name)
    path, model, optim, printed = load_latest(log_dir)
    assert path.name == "model_00004.pt"
    assert re.search(message, printed) and "_00008.pt" in printed
    expected = load_pt(saved / "model_00004.pt"), load_pt(saved / "optim_00004.pt")
    assert is_same((model, optim), expected)
    assert not (tmp_path / "code_was_run").exists()


@pytest.mark.parametrize("name", ["model_00008.pt", "optim_00008.pt"])
def test_load_pt_never_returns_wrong_content_of_damaged_file(log_dir, name):
    """Truncated at every tenth, and a bit flipped at 100 places: an error, or no change if only
    padding was hit."""
    path, rng = log_dir / name, random.Random(0)
    whole, content = path.read_bytes(), load_pt(path)
    damaged = [whole[:len(whole) * tenth // 10] for tenth in range(10)]
    places = rng.sample(range(len(whole)), 80)
    places += rng.sample(range(len(whole) - 5000, len(whole)), 20)
    for at in places:
        flipped = bytes([whole[at] ^ 1 << rng.randrange(8)])
        damaged.append(whole[:at] + flipped + whole[at + 1:])
    refused = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            assert is_same(load_pt(path), content)
        except UserError as error:
            assert name in str(error)
            refused += 1
    assert refused > 80


def test_load_pt_refuses_compressed_file_before_unpacking_it(log_dir, tmp_path):
    """A few megabytes could unpack to gigabytes."""
    path = tmp_path / "compressed.pt"
    with (zipfile.ZipFile(log_dir / "model_00008.pt") as source,
          zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert is_same(torch.load(path), load_pt(log_dir / "model_00008.pt"))
    with pytest.raises(UserError, match="bad entry"):
        load_pt(path)


@pytest.mark.parametrize("weight, message", [
    (torch.zeros(30, 9), "wte.weight is .*30, 9.*, expected .*30, 8"),
    (torch.zeros(30, 8).to_sparse(), "wte.weight is None"),
    (torch.zeros(30, 8, dtype=torch.int64), "wte.weight is None"),
    (7, "invalid config or weights")])
def test_from_checkpoint_refuses_other_weights(log_dir, weight, message):
    content = load_pt(log_dir / "model_00008.pt")
    content["model"]["wte.weight"] = weight
    with pytest.raises(UserError, match=message):
        GPT.from_checkpoint(content)


def test_from_checkpoint_copies_the_weights(log_dir):
    """A tensor in the file with fewer values than its shape, or with requires_grad, is an ordinary
    weight of the model: training cannot write beyond its end."""
    content = load_pt(log_dir / "model_00008.pt")
    content["model"]["wte.weight"] = torch.ones(1, requires_grad=True).expand(30, 8)
    weight = GPT.from_checkpoint(content).wte.weight
    assert weight.is_contiguous() and torch.equal(weight, torch.ones(30, 8))


@pytest.mark.parametrize("name, other", [("adamw", "muon"), ("muon", "adamw")])
def test_load_optimizer_restores_moments_and_keeps_settings(tmp_path, name, other):
    """Settings come from the new command line."""
    manager = make_manager(tmp_path, name)
    save(manager, 5)
    _, _, optim, _ = load_latest(tmp_path)
    optimizer = configure_optimizer(manager.model, name, lr=9e-9, weight_decay=0.7,
                                    betas=(0.1, 0.2))
    checkpoint.load_optimizer(optim, optimizer, manager.scaler)
    moments = manager.optimizer.state_dict()["state"]
    assert is_same(optimizer.state_dict()["state"], moments)
    assert len(moments) == len(list(manager.model.parameters()))
    assert {group["lr"] for group in optimizer.param_groups} == {9e-9}
    with pytest.raises(UserError, match="optimizer state of step 5 does not match"):
        other_optimizer = configure_optimizer(manager.model, other, **SETTINGS)
        checkpoint.load_optimizer(optim, other_optimizer, manager.scaler)


def shrink(state):
    state[0]["exp_avg"] = torch.zeros(1)


def expand(state):
    state[0]["exp_avg"] = torch.zeros(1).expand(30, 8)


def shorten(state):
    state[0]["exp_avg"] = state[0]["exp_avg"].half()


@pytest.mark.parametrize("change", [
    shrink, expand, shorten, dict.clear, lambda state: state[0].clear(),
    lambda state: state.pop(0), lambda state: state[0].update(exp_avg="text")])
def test_load_optimizer_refuses_state_that_does_not_fit(log_dir, change):
    """PyTorch accepts it, and its fused optimizers then write beyond the end of the tensors."""
    manager = make_manager(log_dir)
    _, _, optim, _ = load_latest(log_dir)
    change(optim["optimizer"]["state"])
    with pytest.raises(UserError, match="optimizer state of step 8 does not match"):
        checkpoint.load_optimizer(optim, manager.optimizer, manager.scaler)


def test_atomic_write_keeps_the_old_file_if_writing_fails(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "file") as file:
        file.write(b"new")
        raise RuntimeError
    assert (tmp_path / "file").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1
