"""Files that can be trusted: `.pt` written whole, verified before it is believed, and without code in it."""

import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from gpt.atomic import atomic_write
from gpt.errors import UserError


def write(path: Path, content: dict) -> None:
    """Write a dictionary of tensors and plain values, atomically, with every tensor on the CPU.

    Raises OSError where the file cannot be written, to a full disk for one.
    """
    try:
        with atomic_write(path) as file:
            torch.save(to_cpu(content), file)
    except RuntimeError as error:  # torch.save hides what happened behind a complaint about positions in the file
        if isinstance(error.__context__, OSError):
            raise OSError(error.__context__.errno, error.__context__.strerror, str(path)) from None
        raise


def to_cpu(value: Any) -> Any:
    """`value` with every tensor in its dictionaries and lists copied to the CPU, so that it loads on any machine."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_cpu(item) for item in value)
    return value


def read(path: Path) -> dict:
    """Load a file written by `write`, verified: `torch.load` alone does not check the checksums of its zip archive.

    Raises UserError for a file that is missing, damaged, or not a dictionary of tensors and plain values.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint {str(path)!r}: pass the path of a model_<step>.pt file")
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            # A flipped bit can mark an entry as a folder: torch.load then takes whatever happens to be in memory.
            # torch.save leaves these attributes 0.
            broken = broken or next((entry.filename for entry in archive.infolist() if entry.external_attr), None)
        if broken:
            raise UserError(f"{path} is damaged (at {broken} in it)")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # what a hostile or truncated file raises is not to be foreseen
        reason = re.split(r"\. |\n", str(error))[0][:120]  # PyTorch goes on with how to load it all the same
        raise UserError(f"{path} is damaged or not a .pt file ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors")
    return content
