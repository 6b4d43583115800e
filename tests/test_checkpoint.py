"""gpt/checkpoint.py and gpt/atomic.py: what is saved is whole, what is read is verified."""

import random

import pytest
import torch

from gpt import checkpoint
from gpt.atomic import atomic_write
from gpt.config import GPTConfig
from gpt.errors import UserError
from gpt.model import GPT
from gpt.optim import configure_optimizers

CONFIG = GPTConfig(block_size=8, vocab_size=30, n_layer=1, n_head=1, n_embd=8)


def save(folder, step, optimizer="adamw", config=CONFIG):
    """A checkpoint of a model that has made one update."""
    torch.manual_seed(step)
    model = GPT(config)
    optimizers = configure_optimizers(model, optimizer, lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    idx = torch.randint(30, (2, 8))
    model(idx, idx).backward()
    for one in optimizers:
        one.step()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    path = checkpoint.save(folder, model, optimizers, scaler, step=step, val_loss=1.5, tokenizer="gpt2",
                           train_config={"max_lr": 1e-3, "betas": [0.9, 0.95]})
    return path, model, optimizers, scaler


def test_anyone_can_load_it(tmp_path):
    """The promise of the format: plain torch.load, our two names, nothing in the way."""
    path, model, *_ = save(tmp_path, 250)
    assert path.name == "model_00250.pt"
    content = torch.load(path)
    again = GPT(GPTConfig(**content["config"]))
    again.load_state_dict(content["model"])
    assert {"step": 250, "val_loss": 1.5, "tokenizer": "gpt2"}.items() <= content.items()
    assert not any(name.startswith(("module.", "_orig_mod.")) for name in content["model"])
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_the_newest_complete_one_is_found(tmp_path):
    """Not the best one, not a half one, not a damaged one; and what was passed over is named."""
    assert checkpoint.newest(tmp_path, print) is None
    (tmp_path / "optim_mine.pt").touch()  # not one of ours: never to be removed
    for step in (0, 50, 100, 1000):
        save(tmp_path, step)
    (tmp_path / "model_best.pt").write_bytes((tmp_path / "model_00050.pt").read_bytes())
    assert [p.name for p in sorted(tmp_path.glob("optim_*.pt"))] == [
        "optim_00100.pt", "optim_01000.pt", "optim_mine.pt"]
    said = []
    assert checkpoint.newest(tmp_path, said.append, resumable=True)[0].name == "model_01000.pt" and not said
    (tmp_path / "model_01000.pt").write_bytes((tmp_path / "model_01000.pt").read_bytes()[:-100])
    path, content, optim = checkpoint.newest(tmp_path, said.append, resumable=True)
    assert (path.name, content["step"], optim["step"]) == ("model_00100.pt", 100, 100)
    assert len(said) == 1 and "model_01000.pt" in said[0]
    (tmp_path / "optim_00100.pt").unlink()
    with pytest.raises(UserError, match="none of the 4 checkpoints"):
        checkpoint.newest(tmp_path, said.append, resumable=True)
    assert checkpoint.newest(tmp_path, said.append)[0].name == "model_00100.pt"  # good enough to generate from


def test_a_failed_save_costs_nothing(tmp_path, monkeypatch):
    """A new half is removed again, but never where it has taken the place of one that belongs to a model."""
    _, model, optimizers, scaler = save(tmp_path, 5)
    about = dict(val_loss=None, tokenizer=None, train_config={}, train_windows=3)

    def full(path, content, write=checkpoint.write):
        if path.name.startswith("model"):
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(checkpoint, "write", full)
    for step in (5, 6):
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(tmp_path, model, optimizers, scaler, step=step, **about)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_00005.pt", "optim_00005.pt"]
    assert checkpoint.newest(tmp_path, pytest.fail, resumable=True)[1]["step"] == 5


def test_no_damaged_file_is_believed(tmp_path):
    """Truncated at every tenth, a byte flipped at 400 places: an error, never other weights."""
    path, *_ = save(tmp_path, 1)
    whole = path.read_bytes()
    weights = checkpoint.load(path)["model"]
    for tenth in range(10):
        path.write_bytes(whole[:len(whole) * tenth // 10])
        with pytest.raises(UserError, match="model_00001.pt"):
            checkpoint.load(path)
    harmless = 0
    for place in random.Random(0).sample(range(len(whole)), 400):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1:])
        try:
            content = checkpoint.load(path)
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
        checkpoint.load(tmp_path / "model_00001.pt")
    assert "code was run" not in capsys.readouterr().out


def test_optimizers_go_on_where_they_were(tmp_path):
    """Moments come back; the learning rate, decay and betas of the new command line stay."""
    for name in ("adamw", "muon"):
        _, model, optimizers, scaler = save(tmp_path, 5, name)
        fresh = configure_optimizers(model, name, lr=9e-9, weight_decay=0.7, betas=(0.1, 0.2))
        optim = checkpoint.read(tmp_path / "optim_00005.pt")
        checkpoint.load_optimizers(optim, fresh, scaler)
        for old, new in zip(optimizers, fresh, strict=True):
            for key, state in old.state_dict()["state"].items():
                assert all(torch.equal(value, new.state_dict()["state"][key][k]) for k, value in state.items())
            assert {group["lr"] for group in new.param_groups} == {9e-9}
    other = configure_optimizers(model, "adamw", lr=1, weight_decay=0, betas=(0.0, 0.0))
    with pytest.raises(UserError, match="optimizer state of step 5 does not fit"):
        checkpoint.load_optimizers(optim, other, scaler)


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
