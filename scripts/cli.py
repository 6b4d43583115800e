"""Command line of all scripts: tyro turns a dataclass into flags, --config reads YAML, user errors are one line."""

import argparse
import contextlib
import io
import os
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from gpt.errors import DISK_FULL, UserError

REGISTRY = ConstructorRegistry()


@dataclass(kw_only=True)
class CheckpointConfig:
    """Settings of all commands that use a trained model."""

    checkpoint: str | None = None  # model_<step>.pt, Hugging Face folder or model name; unset: newest in log_dir
    log_dir: str = "log"  # run folder; its newest checkpoint is used by default


def run_cli(main: Callable[[Any], int | None], config_class: type) -> None:
    """Call `main` with the settings from the command line and exit with the status it returns.

    Every field of `config_class` is a flag and a key of a `--config` YAML file; flags override the file.
    """
    with contextlib.suppress(AttributeError, OSError):  # an unprintable character must not end a run
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        status = main(parse_args(config_class, sys.argv[1:]))
        sys.stdout.flush()
    except UserError as error:
        print_error(str(error))
        status = 2
    except BrokenPipeError:  # the reader exited, as `head` does
        redirect_stdout_to_devnull()
        status = 128 + 13  # SIGPIPE, which Windows does not have
    except OSError as error:
        if error.filename is None and error.errno not in DISK_FULL:  # not a disk error
            raise
        advice = ": free disk space and run it again" if error.errno in DISK_FULL else ""
        print_error(f"{error.filename or 'standard output'}: {error.strerror}{advice}")
        redirect_stdout_to_devnull()
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def parse_args(config_class: type, args: Sequence[str]) -> Any:
    """Return a `config_class` built from command-line arguments; `--config FILE` inserts the settings of a YAML file.

    Raises UserError if the file cannot be read, SystemExit after tyro has printed the help or rejected a flag.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    try:
        known, words = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    first_flag = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    words[first_flag:first_flag] = [word for path in known.config for word in yaml_flags(read_yaml(path))]
    spec, local_rank = sys.modules["__main__"].__spec__, int(os.environ.get("LOCAL_RANK", 0))
    description = (sys.modules[config_class.__module__].__doc__ or "").strip().split("\n\n")
    description += ["Settings can also be read from a YAML file: --config FILE. Flags override it."]
    try:
        with contextlib.redirect_stderr(io.StringIO() if local_rank else sys.stderr):
            return tyro.cli(
                config_class, args=words, registry=REGISTRY, console_outputs=not local_rank, use_underscores=True,
                prog=f"python -m {spec.name}" if spec else f"python {sys.argv[0]}",
                description="\n\n".join(textwrap.fill(text, 80, subsequent_indent="  ") for text in description),
                config=(tyro.conf.FlagConversionOff, tyro.conf.PositionalMetavarFromFieldName))
    except SystemExit as exit_:
        if local_rank and exit_.code:
            time.sleep(10)  # torchrun stops this rank once local rank 0 has printed the message and exited
        raise


def read_yaml(path: str) -> dict:
    """Return the settings in a YAML file. Raises UserError if they cannot be read."""
    try:
        settings = yaml.safe_load(Path(path).read_bytes()) or {}
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path} is not a YAML file: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError(f"--config {path} has no settings: expected lines such as `max_steps: 1000`")
    return settings


def yaml_flags(settings: dict, prefix: str = "--") -> Iterator[str]:
    """Yield the settings of a YAML mapping as flags: `model: {n_layer: 4}` becomes `--model.n_layer 4`."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from yaml_flags(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
            yield from (str(v).lower() if isinstance(v, bool) else str(v) for v in (
                value if isinstance(value, list) else [value]))


@REGISTRY.primitive_rule
def bool_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Accept booleans in YAML or Python spelling; a flag without a value is true."""
    return None if info.type is not bool else PrimitiveConstructorSpec(
        nargs=(0, 1), metavar="{true,false}", choices=("true", "false", "True", "False"),
        is_instance=lambda v: isinstance(v, bool), str_from_instance=lambda v: [str(v).lower()],
        instance_from_str=lambda words: words not in (["false"], ["False"]))


@REGISTRY.primitive_rule
def str_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    r"""Show newlines in default values as \n."""
    return None if info.type is not str else PrimitiveConstructorSpec(
        nargs=1, metavar="STR", is_instance=lambda v: isinstance(v, str),
        instance_from_str=lambda words: words[0], str_from_instance=lambda v: [v.replace("\n", "\\n")])


def print_error(message: str) -> None:
    """Print an error to standard error, once for all ranks of torchrun."""
    rank, dist = int(os.environ.get("RANK", 0)), sys.modules.get("torch.distributed")
    if int(os.environ.get("LOCAL_RANK", 0)) > 0 and not (dist and dist.is_initialized()):
        time.sleep(10)  # local rank 0 prints the same error, and torchrun then stops this rank
    print(f"error: {message}" if rank == 0 else f"error (rank {rank}): {message}", file=sys.stderr)


def redirect_stdout_to_devnull() -> None:
    """Discard all further output, including what Python flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def find_checkpoint(config: CheckpointConfig, note: str = "") -> tuple[str, dict]:
    """Return the name and content of the checkpoint to use, and print the name and `note` to standard error.

    Raises UserError if there is none."""
    from gpt import checkpoint  # PyTorch takes seconds to import, and prepare_shakespeare.py does not need it

    if (source := config.checkpoint) is not None:
        content = checkpoint.load_checkpoint(source)
    elif newest := checkpoint.load_latest(config.log_dir, report=lambda line: print(line, file=sys.stderr)):
        source, content = str(newest[0]), newest[1]
    else:
        raise UserError(f"no checkpoint in log_dir {config.log_dir!r}: train one with `python -m scripts.train`, or "
                        f"pass --checkpoint")
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{source}: step {content['step']}{note}" if content["step"] else source + note, file=sys.stderr)
    return source, content


def load_model(config: CheckpointConfig, device: Any, note: str = "") -> tuple[str, Any, Any]:
    """Return the name, the model (`gpt.model.GPT` on `device`, in eval mode) and the tokenizer of a checkpoint.

    See `find_checkpoint`. Raises UserError if there is no checkpoint or if it has no tokenizer."""
    from gpt.model import GPT
    from gpt.tokenizer import Tokenizer

    source, content = find_checkpoint(config, note)
    if not content.get("tokenizer"):
        raise UserError(f"checkpoint {source} has no known tokenizer (trained on raw token ids): use it from Python "
                        f"(GPT.from_checkpoint)")
    return source, GPT.from_checkpoint(content).to(device).eval(), Tokenizer(content["tokenizer"])
