"""gpt/checkpoint.py and gpt/files.py: what is saved is whole, what is loaded is verified."""

import random

import pytest
import torch

from gpt import checkpoint
from gpt.checkpoint import CheckpointManager
from gpt.config import GPTConfig
from gpt.distributed import Distributed
from gpt.errors import UserError
from gpt.files import atomic_write, load_pt
from gpt.metrics import RunLog
from gpt.model import GPT
from gpt.optim import configure_optimizer
from scripts.train import TrainConfig

CONFIG = GPTConfig(block_size=8, vocab_size=30, n_layer=1, n_head=1, n_embd=8)


def save(folder, step, optimizer="adamw", config=CONFIG):
    """A checkpoint of a model that has made one update."""
    torch.manual_seed(step)
    model = GPT(config)
    optimizer = configure_optimizer(model, optimizer, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    idx = torch.randint(30, (2, 8))
    model(idx, idx).backward()
    optimizer.step()
    manager = make_manager(folder, model, optimizer)
    manager.save(step, torch.tensor(1.0), must_succeed=True)
    return manager.last_saved, model, optimizer, manager


def make_manager(folder, model, optimizer):
    """What saves a run's checkpoints, in a folder that is taken for new."""
    dist = Distributed(0, 1, torch.device("cpu"))
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    manager = CheckpointManager(elsewhere, dist, RunLog(TrainConfig(log_dir=str(elsewhere)), dist))
    manager.log_dir = folder
    manager.resume(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), {
        "tokenizer": "gpt2", "train_config": {"max_lr": 1e-3, "betas": [0.9, 0.95], "max_steps": 9}, "data": {}})
    return manager


def test_anyone_can_load_it(tmp_path):
    """The promise of the format: plain torch.load, our two names, nothing in the way."""
    path, model, *_ = save(tmp_path, 250)
    assert path.name == "model_00250.pt"
    content = torch.load(path)
    again = GPT(GPTConfig(**content["config"]))
    again.load_state_dict(content["model"])
    assert {"step": 250, "tokenizer": "gpt2"}.items() <= content.items()
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in content["model"])
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_the_newest_complete_one_is_found(tmp_path):
    """Not the best one, not a half one, not a damaged one; and what was passed over is named."""
    assert checkpoint.load_latest(tmp_path, print) is None
    (tmp_path / "optim_mine.pt").touch()  # not one of ours: never to be removed
    for step in (0, 50, 100, 1000):
        save(tmp_path, step)
    (tmp_path / "model_best.pt").write_bytes((tmp_path / "model_00050.pt").read_bytes())
    assert [p.name for p in sorted(tmp_path.glob("optim_*.pt"))] == [
        "optim_00100.pt", "optim_01000.pt", "optim_mine.pt"]
    said = []
    assert checkpoint.load_latest(tmp_path, said.append, require_optim=True)[0].name == "model_01000.pt" and not said
    (tmp_path / "model_01000.pt").write_bytes((tmp_path / "model_01000.pt").read_bytes()[:-100])
    path, content, optim = checkpoint.load_latest(tmp_path, said.append, require_optim=True)
    assert (path.name, content["step"], optim["step"]) == ("model_00100.pt", 100, 100)
    assert len(said) == 1 and "model_01000.pt" in said[0]
    (tmp_path / "optim_00100.pt").unlink()
    with pytest.raises(UserError, match="none of the 4 checkpoints"):
        checkpoint.load_latest(tmp_path, said.append, require_optim=True)
    assert checkpoint.load_latest(tmp_path, said.append)[0].name == "model_00100.pt"  # good enough to generate from


def test_a_failed_save_costs_nothing(tmp_path, monkeypatch, capsys):
    """Of a full disk: a warning, an error where the save must succeed; and no half of a checkpoint stays."""
    *_, manager = save(tmp_path, 5)

    def full(path, content, save_pt=checkpoint.save_pt):
        if path.name.startswith("model"):
            raise OSError(28, "No space left on device", str(path))
        save_pt(path, content)

    monkeypatch.setattr(checkpoint, "save_pt", full)
    manager.save(6, torch.tensor(1.0), must_succeed=False)
    assert "warning: step 6 is not saved ([Errno 28] No space left" in capsys.readouterr().out
    with pytest.raises(UserError, match="No space left"):
        manager.save(7, torch.tensor(1.0), must_succeed=True)
    manager.save_best(6, val_loss=1.0)
    assert "warning: model_best.pt is not saved" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["model_00005.pt", "optim_00005.pt"]
    assert checkpoint.load_latest(tmp_path, pytest.fail, require_optim=True)[1]["step"] == 5


def test_a_model_is_saved_once_and_a_diverged_one_never(tmp_path):
    """A second save of a step does nothing; infinite weights, or a loss that is none, are not saved."""
    path, model, _, manager = save(tmp_path, 5)
    before = path.stat().st_mtime_ns
    manager.save(5, torch.tensor(1.0), must_succeed=True)
    assert path.stat().st_mtime_ns == before
    with pytest.raises(UserError, match="next loss nan on rank 0: the run has diverged"):
        manager.save(6, torch.tensor(torch.nan), must_succeed=False)
    with torch.no_grad():
        model.wte.weight[3, 3] = torch.inf
    with pytest.raises(UserError, match="norm of the weights inf"):
        manager.save(6, torch.tensor(1.0), must_succeed=False)
    assert not list(tmp_path.glob("*_00006.pt"))


def test_other_data_is_refused_by_the_name_of_its_shard(tmp_path):
    """With the command that begins a new run from these weights; older checkpoints know nothing of their data."""
    *_, manager = save(tmp_path, 5)
    manager.metadata["train_config"]["data_root"] = "mine"
    manager.metadata["data"] = {"train_00000.npy": "9 tokens, hash a", "train_00001.npy": "8 tokens, hash b"}
    manager.assert_same_data({})
    manager.assert_same_data(dict(manager.metadata["data"]))
    for name, old in (("train_00001.npy", "8 tokens, hash c"), ("train_00002.npy", "1 tokens, hash d")):
        with pytest.raises(UserError, match=rf"{name}: was {old}.*--init_from .*model_00005.pt --log_dir"):
            manager.assert_same_data(manager.metadata["data"] | {name: old})
    manager.assert_same_data(manager.metadata["data"] | {"val_00000.npy": "3 tokens, hash e"})  # no validation now


def test_no_damaged_file_is_believed(tmp_path):
    """Truncated at every tenth, a byte flipped at 400 places: an error, never other weights."""
    path, *_ = save(tmp_path, 1)
    whole = path.read_bytes()
    weights = checkpoint.load_checkpoint(path)["model"]
    for tenth in range(10):
        path.write_bytes(whole[:len(whole) * tenth // 10])
        with pytest.raises(UserError, match="model_00001.pt"):
            checkpoint.load_checkpoint(path)
    harmless = 0
    for place in random.Random(0).sample(range(len(whole)), 400):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1:])
        try:
            content = checkpoint.load_checkpoint(path)
        except UserError:
            continue
        harmless += 1  # padding between the entries of the archive
        assert all(torch.equal(content["model"][name], weights[name]) for name in weights)
    assert harmless < 200


class Evil:
    """A pickle that runs code when it is loaded by a careless program."""

    def __reduce__(self):
        return print, ("code was run",)


@pytest.mark.parametrize("content, words", [
    ({"state": 1}, "has no valid model, config, step"), ([1, 2], "holds a list"),
    (Evil(), r"damaged or not a \.pt file \(Weights only load failed\)"),
    ({"model": {}, "config": {"n_layer": 1}, "step": 1}, "does not make a model"),
    ({"model": {}, "config": {"layers": 1}, "step": 1}, "does not make a model"),
    ({"model": 3, "config": 4, "step": 1}, "has no valid model, config")])
def test_foreign_files_are_refused(tmp_path, capsys, content, words):
    """Other people's checkpoints, and worse."""
    torch.save(content, tmp_path / "model_00001.pt")
    with pytest.raises(UserError, match=words):
        checkpoint.load_checkpoint(tmp_path / "model_00001.pt")
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("written_by_older_code", [False, True])
def test_load_optimizer_restores_moments_and_keeps_settings(tmp_path, name, written_by_older_code):
    """Moments come back; the learning rate, decay and betas of the new command line stay."""
    _, model, optimizer, manager = save(tmp_path, 5, name)
    fresh = configure_optimizer(model, name, lr=9e-9, weight_decay=0.7, betas=(0.1, 0.2))
    saved = load_pt(tmp_path / "optim_00005.pt")
    if written_by_older_code:  # which had a list of optimizers
        older = configure_optimizer(model, name, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
        parts = [older.adamw, older.muon] if name == "muon" else [older]
        for part in parts:
            part.step()
        del saved["optimizer"]
        saved["optimizers"] = [part.state_dict() for part in parts]
    checkpoint.load_optimizer(saved, fresh, manager.scaler)
    assert len(optimizer.state_dict()["state"]) == len(list(model.parameters()))
    for key, state in optimizer.state_dict()["state"].items():
        assert all(torch.equal(value, fresh.state_dict()["state"][key][k]) for k, value in state.items())
    assert {group["lr"] for group in fresh.param_groups} == {9e-9}
    other = configure_optimizer(model, {"adamw": "muon", "muon": "adamw"}[name], lr=1, weight_decay=0, betas=(0.0, 0.0))
    with pytest.raises(UserError, match="optimizer state of step 5 does not fit"):
        checkpoint.load_optimizer(saved, other, manager.scaler)


def test_atomic_write_leaves_the_old_file_and_no_litter(tmp_path):
    """An exception in the middle of writing must not cost what was there."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
