"""Step-numbered checkpoints: save, find, verify, load, prune.

`model_00250.pt` holds the weights after 250 steps and everything needed to use them;
`optim_00250.pt` holds the state that only resuming needs. The optimizer file is written first, so a
`model_*.pt` exists only if both do. Files hold tensors and plain Python values and are loaded with
`weights_only=True`: a checkpoint never runs code.
"""

import contextlib
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from gpt import pretrained
from gpt.config import GPTConfig
from gpt.distributed import Ranks
from gpt.errors import UserError
from gpt.files import load_pt, read_metrics, save_pt
from gpt.model import GPT
from gpt.optim import state_shapes
from gpt.tokenizer import Tokenizer

MAX_OPTIM_FILES = 2  # AdamW's state is twice the size of the weights; the older file is a spare

# Settings that define a step: they cannot change when a run resumes.
FIXED_SETTINGS = ("total_batch_size", "seq_len", "seed", "init_from", "overfit_one_batch")
# Keys that every checkpoint has, and the types of their values.
KEYS = {"model": dict, "config": dict, "step": int, "tokenizer": str | None,
        "train_config": dict | None, "data": dict | None}


@dataclass(kw_only=True)
class CheckpointConfig:
    """Settings of all commands that use a trained model."""

    # model_<step>.pt, run folder, Hugging Face folder or name; default: newest in log_dir
    checkpoint: str | None = None
    log_dir: str = "log"  # run folder; its newest checkpoint is used by default


class Checkpoint(NamedTuple):
    """The contents of a model file and, unless {}, of the optimizer file saved with it."""

    path: Path
    model: dict
    optim: dict


@dataclass
class CheckpointManager:
    """Saves the checkpoints of a run in log_dir. All ranks call its methods; rank 0 writes."""

    log_dir: Path
    ranks: Ranks
    assert_lock_held: Callable[[], None]  # see `gpt.files.run_lock`
    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    metadata: dict[str, Any]  # stored in every model file: tokenizer, train_config, data
    saved_step: int = -1

    def __post_init__(self) -> None:
        if self.ranks.is_master:
            for path in self.log_dir.glob(".*_*.pt.tmp"):  # left by a killed process
                path.unlink()

    def resume(self, latest: Checkpoint) -> int:
        """Load the state of the optimizer and the scaler; print and return the checkpoint's step.

        The model has the checkpoint's weights already. Raises UserError if the data, the length or
        the optimizer of this run does not fit.
        """
        path, self.saved_step = latest.path, latest.model["step"]
        train_config, saved = self.metadata["train_config"], latest.model["train_config"] or {}
        max_steps = train_config["max_steps"]
        if self.saved_step > max_steps:
            raise UserError(f"--max_steps is {max_steps}, but {path} is already at step "
                            f"{self.saved_step}: pass a higher --max_steps, or another --log_dir "
                            f"for a new run")
        assert_same_data(latest, self.metadata["data"], train_config["data_root"])
        load_optimizer(latest.optim, self.optimizer, self.scaler)
        latest.optim.clear()  # gigabytes
        changes = [f"{name} {saved[name]} -> {value}" for name, value in train_config.items()
                   if saved.get(name, value) != value]
        changed = f", changed: {'; '.join(changes)}" if changes else ""
        self.ranks.print(f"resuming from {path} at step {self.saved_step} of {max_steps}{changed}")
        return self.saved_step

    def save(self, step: int, required: bool = False) -> None:
        """Save the model and the optimizer state after `step` steps, unless they are saved already.

        If the disk is full, print a warning or, if the save is `required`, raise UserError. Raises
        UserError if the weights are not finite.
        """
        if step == self.saved_step:
            return
        if not torch.nn.utils.get_total_norm(self.model.parameters()).isfinite():
            raise UserError(f"step {step}: the weights are infinite or NaN and not saved; rerun "
                            f"with a lower --max_lr to resume from the last checkpoint")
        if self.ranks.is_master:
            optim_path = self.log_dir / f"optim_{step:05d}.pt"
            path = self.log_dir / f"model_{step:05d}.pt"
            try:
                self.assert_lock_held()
                save_pt(optim_path, {"step": step, "scaler": self.scaler.state_dict(),
                                     "optimizer": self.optimizer.state_dict()})
                save_model(path, self.model, step=step, **self.metadata)
            except OSError as error:
                self.assert_lock_held()
                optim_path.unlink(missing_ok=True)  # useless alone
                message = f"step {step} is not saved ({error.strerror})"
                if required:
                    raise UserError(f"{message}: free disk space and rerun the same command to "
                                    f"resume from the last checkpoint") from None
                self.ranks.print(f"warning: {message}: training continues; free disk space before "
                                 f"the next save")
                return
            self.ranks.print(f"saved {path}")
            prune_optim_files(self.log_dir, step)
        self.saved_step = step

    def save_best(self, step: int, val_loss: float) -> None:
        """Save model_best.pt, the model after `step` steps; print a warning if the disk is full."""
        if self.ranks.is_master:
            try:
                self.assert_lock_held()
                save_model(self.log_dir / "model_best.pt", self.model, step=step, val_loss=val_loss,
                           **self.metadata)
            except OSError as error:
                self.ranks.print(f"warning: model_best.pt is not saved ({error.strerror}): free "
                                 f"disk space")


def save_model(path: Path, model: GPT, **metadata: Any) -> None:
    """Write weights, config and `metadata` (`step`, `tokenizer`, …). Raises as `save_pt` does."""
    save_pt(path, {"model": model.state_dict(), "config": asdict(model.config), **metadata})


def prune_optim_files(log_dir: Path, step: int) -> None:
    """Delete all optimizer files up to `step` but the newest MAX_OPTIM_FILES."""
    paths = [path for path in log_dir.glob("optim_*.pt") if 0 <= parse_step(path) <= step]
    for path in sorted(paths, key=parse_step)[:-MAX_OPTIM_FILES]:
        with contextlib.suppress(OSError):  # another program has it open, for example
            path.unlink()


def parse_step(path: Path) -> int:
    """Return the step in the name of a checkpoint file, -1 if there is none."""
    match = re.fullmatch(r"(?:model|optim)_(\d+)\.pt", path.name)
    return int(match[1]) if match else -1


def load_checkpoint(source: str | Path) -> dict:
    """Return a checkpoint on the CPU: a `model_<step>.pt`, the newest one in a run's folder, a
    checkpoint of nanoGPT or build-nanogpt, or a folder or model name in Hugging Face's format
    (gpt/pretrained.py).

    Raises UserError if it is missing or damaged, or if its config and weights do not match.
    """
    path = Path(source)
    if path.is_dir() and (latest := load_latest(path, print_to_stderr)):
        return latest.model
    if path.suffix == ".safetensors":
        source = path.parent
        checkpoint = pretrained.load_pretrained(source)
    elif path.is_file() or path.suffix == ".pt":
        checkpoint = load_pt(path)
        try:
            checkpoint = convert_nanogpt(checkpoint)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"checkpoint {path} is not one of nanoGPT's ({error!r})") from None
    else:
        checkpoint = pretrained.load_pretrained(source)
    found = ", ".join(map(str, list(checkpoint)[:8]))
    checkpoint = dict.fromkeys(KEYS) | checkpoint
    for key, expected_type in KEYS.items():
        if not isinstance(checkpoint[key], expected_type):
            raise UserError(f"checkpoint {path} has no valid {key} (found: {found}): pass a "
                            f"model_<step>.pt")
    try:
        GPT.on_meta_device(checkpoint)
    except UserError as error:
        raise UserError(f"checkpoint {source}: {error}") from None
    return checkpoint


def convert_nanogpt(checkpoint: dict) -> dict:
    """Return a checkpoint of nanoGPT or build-nanogpt as one of ours; any other as it is.

    nanoGPT's models compute the exact GELU instead of its tanh approximation, so logits differ
    slightly. Biases that it trained without are zero.
    """
    config = checkpoint.get("model_args")
    if isinstance(checkpoint.get("config"), SimpleNamespace):  # see `gpt.files.load_pt`
        config = vars(checkpoint["config"])
    if config is None:
        return checkpoint
    weights = {}
    for name, weight in checkpoint["model"].items():
        name = name.removeprefix("_orig_mod.").removeprefix("transformer.")
        if not name.endswith(".attn.bias"):  # a causal mask
            weights[name] = weight
    if not torch.equal(weights.pop("lm_head.weight"), weights["wte.weight"]):
        raise ValueError("lm_head.weight differs from wte.weight")
    for name in [*weights]:
        if name.endswith(".weight") and name not in ("wte.weight", "wpe.weight"):
            bias = name.replace("weight", "bias")
            weights.setdefault(bias, torch.zeros(len(weights[name])))
    names = {each.name for each in fields(GPTConfig)}
    config = {name: value for name, value in config.items() if name in names}
    has_gpt2_tokens = config["vocab_size"] in (50257, 50304)  # padded to a multiple of 64
    return {"model": weights, "config": config, "tokenizer": "gpt2" if has_gpt2_tokens else None,
            "step": int(checkpoint.get("iter_num", checkpoint.get("step", 0)))}


def load_latest(log_dir: str | Path, print_fn: Callable[[str], None],
                with_optim: bool = False) -> Checkpoint | None:
    """Return the newest usable checkpoint in `log_dir`, with its optimizer state if `with_optim`;
    None if there are no checkpoints.

    Skips, with a message, checkpoints that are damaged, whose step differs from their file name, or
    that lack a requested optimizer file. Raises UserError if it skips all, so that no run starts
    over by accident.
    """
    paths = [path for path in Path(log_dir).glob("model_*.pt") if parse_step(path) >= 0]
    for path in sorted(paths, key=parse_step, reverse=True):
        try:
            model, optim = load_checkpoint(path), {}
            files = {path: model}
            if with_optim:
                optim_path = path.with_name(path.name.replace("model", "optim"))
                if not optim_path.is_file():
                    raise UserError(f"{optim_path.name} is missing, but needed to resume")
                files[optim_path] = optim = load_pt(optim_path)
            for file, content in files.items():
                if content.get("step") != parse_step(path):
                    raise UserError(f"the step in {file} is {content.get('step')}")
            return Checkpoint(path, model, optim)
        except UserError as error:
            print_fn(f"skipping {path.name}: {error}")
    if paths:
        raise UserError(f"none of the {len(paths)} checkpoints in {str(log_dir)!r} is usable: pass "
                        f"another --log_dir for a new run, or move them away")
    return None


def load_optimizer(optim: dict, optimizer: torch.optim.Optimizer,
                   scaler: torch.amp.GradScaler) -> None:
    """Load the content of an `optim_<step>.pt`, but keep the current learning rate, weight decay
    and betas.

    Raises UserError if it does not fit the optimizer's parameters.
    """
    try:
        state = optim["optimizer"]["state"]
        # Empty before the first update; in fp16 the first updates can be skipped.
        if state or (optim["step"] > 0 and not optim["scaler"]):
            assert_same_shapes(state, state_shapes(optimizer))
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": groups})
        if optim["scaler"]:
            scaler.load_state_dict(optim["scaler"])
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"optimizer state of step {optim.get('step')} does not match ({error}): "
                        f"pass the --optimizer of the original run, or start a new one with "
                        f"--init_from and another --log_dir") from None


def assert_same_shapes(state: dict, shapes: dict[int, dict[str, torch.Size]]) -> None:
    """Raise ValueError unless `state` has a float32 tensor of each of the `shapes`, and no others.

    PyTorch does not check this, and a fused optimizer would write beyond the end of the tensors.
    """
    if state.keys() != shapes.keys():
        raise ValueError(f"it has {len(state)} parameters, expected {len(shapes)}")
    for index, expected in shapes.items():
        found = {name: tensor.shape for name, tensor in state[index].items()
                 if tensor.layout == torch.strided and tensor.is_contiguous()
                 and tensor.dtype == torch.float32}
        if found != expected:
            raise ValueError(f"parameter {index} has {found}, expected {expected}")


def assert_same_settings(latest: Checkpoint, train_config: dict[str, Any]) -> None:
    """Raise UserError if a setting that defines a step differs from the checkpoint's.

    train_config: the settings as plain values. With `init_from`, the model's are not compared.
    """
    path, saved = latest.path, latest.model["train_config"] or {}
    pairs = [(name, saved.get(name, train_config[name]), train_config[name])
             for name in FIXED_SETTINGS]
    if train_config["init_from"] == "scratch":
        pairs += [(f"model.{name}", value, train_config["model"][name])
                  for name, value in latest.model["config"].items() if name != "dropout"]
    for name, old, new in pairs:
        if new != old:
            raise UserError(f"--{name} is {new}, but {path} was trained with {old}: pass --{name} "
                            f"{old} to resume, or another --log_dir to start a new run (with "
                            f"--init_from {path} from these weights)")


def assert_same_data(latest: Checkpoint, data: dict[str, str], data_root: str) -> None:
    """Raise UserError naming the first shard that differs from the checkpoint's training data.

    data: see `gpt.shards.fingerprint`.
    """
    path, saved = latest.path, latest.model["data"] or {}
    for name in {**saved, **data}:
        old, new = saved.get(name, "missing"), data.get(name, "missing")
        if new != old:
            raise UserError(f"data in {data_root!r} is not what {path} was trained on ({name}: was "
                            f"{old}, is {new}): restore it, or start a new run with --init_from "
                            f"{path} --log_dir NEW")


def find_checkpoint(config: CheckpointConfig, verbose: bool = True) -> tuple[str, dict]:
    """Return the name and content of the checkpoint to use; print its name to standard error, and
    whether model_best.pt has a lower validation loss."""
    folder = config.checkpoint or config.log_dir
    latest = load_latest(folder, print_to_stderr)
    if latest:
        source, checkpoint = str(latest.path), latest.model
    elif config.checkpoint:
        source, checkpoint = config.checkpoint, load_checkpoint(config.checkpoint)
    else:
        raise UserError(f"no checkpoint in log_dir {config.log_dir!r}: train one with `python -m "
                        f"scripts.train`, or pass --checkpoint")
    if verbose:
        step = f": step {checkpoint['step']}" if checkpoint["step"] else ""
        print_to_stderr(f"{source}{step}")
        best = Path(folder) / "model_best.pt"
        if latest and best.exists():
            losses = [(record["loss"], record["step"]) for record
                      in read_metrics(best.with_name("metrics.jsonl")) if record["split"] == "val"]
            loss, step = min(losses, default=(0, checkpoint["step"]))
            if step < checkpoint["step"]:
                print_to_stderr(f"{best}: step {step} had a lower validation loss, {loss:.4f}")
    return source, checkpoint


def print_to_stderr(text: str) -> None:
    """Print to standard error."""
    print(text, file=sys.stderr)


def load_model(config: CheckpointConfig, device: torch.device,
               verbose: bool = True) -> tuple[str, GPT, Tokenizer]:
    """Return the name, the model (on `device`, in evaluation mode) and the tokenizer of a
    checkpoint, see `find_checkpoint`."""
    source, checkpoint = find_checkpoint(config, verbose)
    if not checkpoint["tokenizer"]:
        raise UserError(f"checkpoint {source} has no known tokenizer (trained on raw token ids): "
                        f"use it from Python (GPT.from_checkpoint)")
    model = GPT.from_checkpoint(checkpoint).to(device).eval()
    return source, model, Tokenizer(checkpoint["tokenizer"])
