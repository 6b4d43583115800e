"""Step-numbered checkpoints: save, find, verify, load, prune.

`model_00250.pt` holds the weights after 250 updates with all that is needed to use them; `optim_00250.pt` holds what
only resuming needs. The optimizer's half is written first, so a `model_*.pt` is there only when both are. Files
hold tensors and plain Python values and are loaded with `weights_only=True`: a checkpoint never runs code.
"""

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gpt import pretrained
from gpt.errors import UserError
from gpt.model import GPT
from gpt.serialization import read, write

KEEP_OPTIMIZERS = 2  # an optimizer's state is twice the size of the weights; older ones are of no use


def save(log_dir: str | Path, model: GPT, optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler, *,
         step: int, **about: Any) -> Path:
    """Write `optim_<step>.pt` and `model_<step>.pt`, remove optimizer halves that are too old; the model's path.

    about: see `save_model`. Raises OSError, and leaves what was there, where they cannot be written.
    """
    log_dir = Path(log_dir)
    path, optim_path = log_dir / f"model_{step:05d}.pt", log_dir / f"optim_{step:05d}.pt"
    write(optim_path, {"step": step, "weights": fingerprint(model.state_dict()), "scaler": scaler.state_dict(),
                       "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
    try:
        save_model(path, model, step=step, **about)
    except OSError:
        if not path.exists():  # of no use alone, and the disk may be full
            optim_path.unlink()
        raise
    halves = [half for half in log_dir.glob("optim_*.pt") if 0 <= step_of(half) <= step]
    for old in sorted(halves, key=step_of)[:-KEEP_OPTIMIZERS]:
        old.unlink()
    return path


def save_model(path: Path, model: GPT, **about: Any) -> None:
    """Write the weights and all that is needed to use them to `path`.

    about: `step`; `val_loss` of this very model, in nats per token, and `hellaswag`, its accuracies, or None where they
    were not measured; `tokenizer`, its name or None; `train_config`, the settings of the run, and `train_windows`, the
    size of its train split.
    """
    write(path, {"model": model.state_dict(), "config": asdict(model.config), **about})


def fingerprint(weights: dict[str, torch.Tensor]) -> int:
    """A number that differs, all but surely, where any bit of the weights (float32) does; exact on every device."""
    sums = [tensor.detach().view(torch.int32).sum(dtype=torch.int64) for tensor in weights.values()]
    return sum(place * value for place, value in enumerate(torch.stack(sums).tolist(), start=1)) % 2**63


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint file, -1 if there is none."""
    match = re.fullmatch(r"(?:model|optim)_(\d+)\.pt", path.name)
    return int(match[1]) if match else -1


def load(source: str | Path) -> dict:
    """A model with all that is known of it, on the CPU: from one of our `model_<step>.pt`, or in Hugging Face's format
    from a folder or, by its name, from the hub (gpt/pretrained.py).

    Raises UserError for what is missing, damaged, or does not make a model.
    """
    path = Path(source)
    checkpoint = read(path) if path.is_file() or path.suffix == ".pt" else pretrained.load(source)
    kinds = {"model": dict, "config": dict, "step": int, "tokenizer": str | None, "train_config": dict | None}
    missing = [key for key, kind in kinds.items() if not isinstance(checkpoint.get(key), kind)]
    if missing:
        found = ", ".join(map(str, list(checkpoint)[:8]))
        raise UserError(f"checkpoint {path} is not one of ours: it has no valid {', '.join(missing)} (found: {found})")
    try:
        GPT.from_checkpoint(checkpoint)
    except UserError as error:
        raise UserError(f"checkpoint {source} {error}") from None
    return checkpoint


def newest(log_dir: str | Path, report: Callable[[str], None],
           resumable: bool = False) -> tuple[Path, dict, dict] | None:
    """The newest complete checkpoint in `log_dir`: its path, its content, and the optimizer's half.

    The optimizer's half is {} unless `resumable` asks for checkpoints that have it. A file that is damaged, of
    another step than its name says or of another run than its half is named through `report`, and the next older
    one is tried. None if there are no checkpoints at all; UserError if there are some and none is complete, so that
    nobody starts over by accident.
    """
    found = [path for path in Path(log_dir).glob("model_*.pt") if step_of(path) >= 0]
    for path in sorted(found, key=step_of, reverse=True):
        half = path.with_name(path.name.replace("model", "optim"))
        if resumable and not half.exists():
            report(f"skipping {path}: {half.name} is not there, so it cannot be continued")
            continue
        try:
            model, optim = load(path), read(half) if resumable else {}
        except UserError as error:
            report(f"skipping: {error}")
            continue
        if model["step"] != step_of(path):
            report(f"skipping {path}: it is of step {model['step']}, not {step_of(path)}")
        elif resumable and (optim.get("step"), optim.get("weights")) != (step_of(path), fingerprint(model["model"])):
            report(f"skipping {path}: {half.name} was not saved with it")
        else:
            return path, model, optim
    if found:
        raise UserError(f"none of the {len(found)} checkpoints in {str(log_dir)!r} can be used: pass another --log_dir "
                        f"for a new run, or move the damaged files away")
    return None


def load_optimizers(optim: dict, optimizers: list[torch.optim.Optimizer], scaler: torch.amp.GradScaler) -> None:
    """Continue with the momenta of a checkpoint's optimizer half; learning rate, decay and betas stay as they are set.

    Raises UserError where they belong to other optimizers.
    """
    try:
        for optimizer, saved in zip(optimizers, optim["optimizers"], strict=True):
            groups = optimizer.state_dict()["param_groups"]
            if [group["params"] for group in groups] != [group["params"] for group in saved["param_groups"]]:
                raise ValueError("other groups of parameters")
            optimizer.load_state_dict({"state": saved["state"], "param_groups": groups})
        if optim["scaler"]:
            scaler.load_state_dict(optim["scaler"])
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"the optimizer state of step {optim.get('step')} does not fit ({error}): pass the --optimizer "
                        f"that the run began with, or start a new one with --init_from and another --log_dir") from None


def changed_settings(checkpoint: dict, settings: dict, train_windows: int) -> str:
    """The settings of a run, and the size of its data, that differ from the checkpoint's, in words; "" if none do."""
    before = {"windows of the train split": checkpoint.get("train_windows", train_windows),
              **(checkpoint.get("train_config") or {})}
    now = {**settings, "windows of the train split": train_windows}
    return "; ".join(f"{key} {before[key]} -> {value}" for key, value in now.items() if before.get(key, value) != value)
