"""Step-numbered checkpoints: save, find, verify, load, prune.

`model_00250.pt` holds the weights after 250 steps and everything needed to use them; `optim_00250.pt` holds the state
that only resuming needs. The optimizer file is written first, so a `model_*.pt` exists only if both do. Files hold
tensors and plain Python values and are loaded with `weights_only=True`: a checkpoint never runs code.
"""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gpt import pretrained
from gpt.device import hardware_name
from gpt.distributed import Distributed
from gpt.errors import UserError
from gpt.files import load_pt, save_pt
from gpt.metrics import RunLog
from gpt.model import GPT
from gpt.optim import merge_state_dicts

MAX_OPTIM_FILES = 2  # AdamW's state is twice the size of the weights; the older file is a spare


class CheckpointManager:
    """Saves a run's checkpoints to log_dir and resumes from the newest complete one. All ranks call every method.

    Raises UserError if log_dir has checkpoints and none is complete.
    """

    def __init__(self, log_dir: str | Path, dist: Distributed, log: RunLog):
        self.log_dir, self.dist, self.log = Path(log_dir), dist, log
        latest: tuple = load_latest(log_dir, log.print, require_optim=True) or (None, None, None)
        path, self.model_state, self.optim_state = latest
        self.last_saved = path or "step 0"
        self.saved_step = self.model_state["step"] if self.model_state else -1

    def resume(self, model: GPT, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
               metadata: dict) -> int:
        """Load the newest checkpoint's optimizer and scaler state and return its step; 0 if there is no checkpoint.

        model: already has the checkpoint's weights. metadata: stored in every checkpoint besides weights, config and
        step: `tokenizer`, `train_config` (plain values) and `data` (the data's fingerprint).
        Raises UserError if the optimizer state or the data does not match this run.
        """
        self.model, self.optimizer, self.scaler, self.metadata = model, optimizer, scaler, metadata
        if self.model_state is None:
            return 0
        saved, step = self.model_state, self.saved_step
        self.assert_same_data(saved.get("data") or {})
        load_optimizer(self.optim_state, optimizer, scaler)
        changed = diff_settings(saved.get("train_config") or {}, metadata["train_config"])
        self.log.print(f"resuming from {self.last_saved} at step {step} of {metadata['train_config']['max_steps']}"
                       + (f", changed: {changed}" if changed else ""))
        self.model_state = self.optim_state = None  # gigabytes
        return step

    def assert_same_data(self, data: dict[str, str]) -> None:
        """Raise UserError with the name of the shard if the data is not what the checkpoint was trained on.

        Only splits that both have are compared: val has no fingerprint in a run without validation.
        """
        now = self.metadata["data"]
        splits = {name.split("_")[0] for name in data} & {name.split("_")[0] for name in now}
        changed = [name for name in {**data, **now} if name.split("_")[0] in splits and data.get(name) != now.get(name)]
        if changed:
            name, data_root = changed[0], self.metadata["train_config"]["data_root"]
            raise UserError(f"data in {data_root!r} is not what {self.last_saved} was trained on ({name}: was "
                            f"{data.get(name, 'missing')}, is {now.get(name, 'missing')}): restore it, or start a new "
                            f"run with --init_from {self.last_saved} --log_dir NEW")

    def save(self, step: int, next_loss: torch.Tensor, must_succeed: bool) -> None:
        """Save the model and the optimizer state after `step` steps, unless they are already saved.

        next_loss: a scalar, the model's loss on this rank's next batch: finite weights can be so large that every loss
        is NaN. If the disk is full, warn or, if the save `must_succeed`, raise UserError. Raises UserError, and saves
        nothing, if the model has diverged or ranks have different weights.
        """
        if step == self.saved_step:
            return
        weight_norm = torch.nn.utils.get_total_norm(self.model.parameters())
        for rank, (norm, loss) in enumerate(self.dist.gather(torch.stack([weight_norm, next_loss]))):
            self.assert_finite(step, f"norm of the weights {norm}, next loss {loss} on rank {rank}", norm, loss)
        self.assert_same_weights()
        error = ""
        if self.dist.is_master:
            try:
                self.write(step)
            except OSError as os_error:
                error = str(os_error)
        if error := self.dist.broadcast(error):
            message = f"step {step} is not saved ({error}), the last checkpoint is {self.last_saved}"
            if must_succeed:
                raise UserError(f"{message}: free disk space and rerun the same command to resume from there")
            self.log.print(f"warning: {message}: training continues, free disk space before the next save")
        else:
            self.last_saved, self.saved_step = self.log_dir / f"model_{step:05d}.pt", step

    def write(self, step: int) -> None:
        """Write both files of a checkpoint and delete old optimizer files. Raises OSError if they cannot be written."""
        path, optim_path = (self.log_dir / f"{name}_{step:05d}.pt" for name in ("model", "optim"))
        self.log.sync()
        try:
            save_pt(optim_path, {"step": step, "weights_checksum": weights_checksum(self.model.state_dict()),
                                 "scaler": self.scaler.state_dict(), "optimizer": self.optimizer.state_dict()})
            save_model(path, self.model, step=step, **self.metadata)
        except OSError:
            if not path.exists():  # useless alone, and the disk may be full
                optim_path.unlink(missing_ok=True)
            raise
        self.log.print(f"saved {path}")
        optim_paths = [path for path in self.log_dir.glob("optim_*.pt") if 0 <= parse_step(path) <= step]
        for old in sorted(optim_paths, key=parse_step)[:-MAX_OPTIM_FILES]:
            with contextlib.suppress(OSError):
                old.unlink()

    @contextlib.contextmanager
    def rescue(self, step: int) -> Iterator[None]:
        """Save the model after `step` steps if the block fails, so that a failed evaluation loses no training.

        Rank 0 saves alone, as other ranks may have failed. A UserError means that the run has diverged: do not save.
        """
        try:
            yield
        except UserError:
            raise
        except Exception:
            if self.dist.is_master and step not in (0, self.saved_step):
                self.write(step)
            raise

    def assert_same_weights(self) -> None:
        """Raise UserError if ranks on equal hardware have different weights."""
        self.dist.assert_same({"weights_checksum": weights_checksum(self.model.state_dict())}, f"faulty processor or "
                              f"memory, nothing is saved; resume from {self.last_saved} without that machine",
                              group=hardware_name(self.dist.device))

    def save_best(self, step: int, val_loss: float) -> None:
        """Save model_best.pt after `step` steps; warn if the disk is full. Raises UserError if rank weights differ."""
        self.assert_same_weights()
        if self.dist.is_master:
            try:
                save_model(self.log_dir / "model_best.pt", self.model, step=step, val_loss=val_loss, **self.metadata)
            except OSError as error:
                self.log.print(f"warning: model_best.pt is not saved ({error}): free disk space; any older one is kept")

    def assert_finite(self, step: int, description: str, *values: float) -> None:
        """Raise UserError with the `description` of the values if one of them is infinite or NaN."""
        if not all(map(math.isfinite, values)):
            max_lr = self.metadata["train_config"]["max_lr"]
            raise UserError(f"step {step}: {description}, the run has diverged: rerun with a lower --max_lr (now "
                            f"{max_lr:g}) or --grad_clip or more --warmup_steps; it resumes from {self.last_saved}")

    def check_update(self, step: int, losses: Sequence[float], grad_norm: float) -> None:
        """Raise UserError if step number `step` (from 0) has diverged; print a line if fp16 gradients overflowed.

        losses: one per rank. An overflow is normal while the loss scale can be lowered: GradScaler skips the update.
        """
        for rank, loss in enumerate(losses):
            where = f" on rank {rank}" if len(losses) > 1 else ""
            self.assert_finite(step, f"loss {loss}{where}, gradient norm {grad_norm}", loss)
        if self.scaler.is_enabled() and not math.isfinite(grad_norm) and self.scaler.get_scale() >= 1:
            self.log.print(f"step {step}: no update, the gradients overflow in fp16; loss scale now "
                           f"{self.scaler.get_scale():g}")
            return
        self.assert_finite(step, f"gradient norm {grad_norm}", grad_norm)


def save_model(path: Path, model: GPT, **metadata: Any) -> None:
    """Write weights, config and `metadata` (`step`, `tokenizer`, `train_config`, ...). Raises OSError on failure."""
    save_pt(path, {"model": model.state_dict(), "config": asdict(model.config), **metadata})


def weights_checksum(weights: dict[str, torch.Tensor]) -> int:
    """Return a checksum of float32 weights, equal on every device and almost certainly changed by any flipped bit."""
    sums = [tensor.detach().view(torch.int32).sum(dtype=torch.int64) for tensor in weights.values()]
    return sum(i * value for i, value in enumerate(torch.stack(sums).tolist(), start=1)) % 2**63


def parse_step(path: Path) -> int:
    """Return the step in the name of a checkpoint file, -1 if there is none."""
    match = re.fullmatch(r"(?:model|optim)_(\d+)\.pt", path.name)
    return int(match[1]) if match else -1


def load_checkpoint(source: str | Path) -> dict:
    """Return a checkpoint on the CPU: a `model_<step>.pt`, or a folder or hub name in Hugging Face's format
    (gpt/pretrained.py).

    Raises UserError if it is missing or damaged, or if its config and weights do not match.
    """
    path = Path(source)
    checkpoint = load_pt(path) if path.is_file() or path.suffix == ".pt" else pretrained.load_pretrained(source)
    types = {"model": dict, "config": dict, "step": int, "tokenizer": str | None, "train_config": dict | None}
    missing = [key for key, expected_type in types.items() if not isinstance(checkpoint.get(key), expected_type)]
    if missing:
        found = ", ".join(map(str, list(checkpoint)[:8]))
        raise UserError(f"checkpoint {path} has no valid {', '.join(missing)} (found: {found}): pass a model_<step>.pt")
    try:
        GPT.from_checkpoint(checkpoint)
    except (UserError, ValueError) as error:
        raise UserError(f"checkpoint {source}: {error}") from None
    return checkpoint


def load_latest(log_dir: str | Path, report: Callable[[str], None],
                require_optim: bool = False) -> tuple[Path, dict, dict] | None:
    """Return the newest complete checkpoint in `log_dir`: its path, its content and the content of its optimizer file.

    The last is {} unless `require_optim`, which skips checkpoints without an optimizer file. Checkpoints that are
    damaged, have another step than their name, or do not match their optimizer file are reported and skipped. Returns
    None if there are no checkpoints. Raises UserError if there are some but none is complete, so that no run starts
    over by accident.
    """
    paths = [path for path in Path(log_dir).glob("model_*.pt") if parse_step(path) >= 0]
    for path in sorted(paths, key=parse_step, reverse=True):
        optim_path = path.with_name(path.name.replace("model", "optim"))
        if require_optim and not optim_path.exists():
            report(f"skipping {path}: {optim_path.name} is missing, which resuming needs")
            continue
        try:
            model, optim = load_checkpoint(path), load_pt(optim_path) if require_optim else {}
        except UserError as error:
            report(f"skipping: {error}")
            continue
        checksum = optim.get("weights_checksum", optim.get("weights"))  # the key's name in older files
        if model["step"] != parse_step(path):
            report(f"skipping {path}: its step is {model['step']}, not {parse_step(path)}")
        elif require_optim and (optim.get("step"), checksum) != (parse_step(path), weights_checksum(model["model"])):
            report(f"skipping {path}: {optim_path.name} was not saved with it")
        else:
            return path, model, optim
    if paths:
        raise UserError(f"none of the {len(paths)} checkpoints in {str(log_dir)!r} is usable: pass another --log_dir "
                        f"for a new run, or move them away")
    return None


def load_optimizer(saved: dict, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """Load the content of an `optim_<step>.pt`, but keep the current learning rate, weight decay and betas.

    Raises UserError if it is from another optimizer.
    """
    try:
        state_dict = saved["optimizer"] if "optimizer" in saved else merge_state_dicts(saved["optimizers"])
        groups = optimizer.state_dict()["param_groups"]
        if [group["params"] for group in groups] != [group["params"] for group in state_dict["param_groups"]]:
            raise ValueError("different parameter groups")
        optimizer.load_state_dict({"state": state_dict["state"], "param_groups": groups})
        if saved["scaler"]:
            scaler.load_state_dict(saved["scaler"])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"optimizer state of step {saved.get('step')} does not match ({error}): pass the --optimizer "
                        f"of the original run, or start a new one with --init_from and another --log_dir") from None


def diff_settings(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Return the settings that differ, with both values, as text; "" if none do."""
    return "; ".join(f"{key} {old[key]} -> {value}" for key, value in new.items() if old.get(key, value) != value)
