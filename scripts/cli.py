"""Command line of all scripts: tyro turns a dataclass into flags, --config reads YAML, and a user
error is one line and exit status 2."""

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro
import yaml
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from gpt.errors import UserError

REGISTRY = ConstructorRegistry()
YAML_MARK = "\0"  # before strings of a YAML file that look like flags; no argument can contain it


def run_cli(main: Callable[[Any], int | None], config_class: type) -> None:
    """Call `main` with the settings from the command line and exit with the status it returns.

    Every field of `config_class` is a flag and a key of a `--config` YAML file; flags override the
    file.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # see scripts/__init__.py
    open_missing_streams()
    try:
        status = main(parse_args(config_class, sys.argv[1:]))
        sys.stdout.flush()
    except UserError as error:
        status = 2
        print_error(str(error))
    except BrokenPipeError:  # the reader has exited, as `head` does
        status = 128 + 13  # SIGPIPE, which Windows does not have
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at exit
    except OSError as error:
        if error.filename is None:
            raise
        status = 2
        print_error(f"{error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        status = 130
        print("interrupted", file=sys.stderr)
    sys.exit(status)


def open_missing_streams() -> None:
    """Make all output printable, and open the standard streams that are closed, as after `>&-`: the
    next file would take their descriptors."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        elif mode == "w" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def print_error(message: str) -> None:
    """Print an error to standard error."""
    print(f"error: {message}", file=sys.stderr)


def parse_args(config_class: type, args: Sequence[str]) -> Any:
    """Return a `config_class` built from command-line arguments; `--config FILE` inserts the
    settings of a YAML file.

    Raises UserError if the file cannot be read, SystemExit after tyro has printed the help or
    rejected a flag.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    try:
        known, words = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    for word in words:
        if difflib.get_close_matches(word, ["--config"], cutoff=0.85):
            raise UserError(f"unknown option {word}: did you mean --config?")
    first_flag = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    for path in reversed(known.config):
        words[first_flag:first_flag] = yaml_flags(read_yaml(path))
    spec = sys.modules["__main__"].__spec__
    description = (f"{sys.modules[config_class.__module__].__doc__}\n\nSettings can also be read "
                   f"from a YAML file: --config FILE. Flags override it.")
    return tyro.cli(
        config_class, args=words, registry=REGISTRY, use_underscores=True, description=description,
        prog=f"python -m {spec.name}" if spec else f"python {sys.argv[0]}",
        config=(tyro.conf.FlagConversionOff, tyro.conf.PositionalMetavarFromFieldName))


def read_yaml(path: str) -> dict:
    """Return the settings in a YAML file. Raises UserError if they cannot be read."""
    try:
        settings = yaml.safe_load(Path(path).read_bytes()) or {}
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--config {path} is not a YAML file: {reason}") from None
    if not isinstance(settings, dict):
        raise UserError(f"--config {path} has no settings: expected lines such as `max_steps: "
                        f"1000`")
    return settings


def yaml_flags(settings: dict, prefix: str = "--") -> Iterator[str]:
    """Yield the settings of a YAML mapping as flags: `model: {n_layer: 4}` becomes
    `--model.n_layer 4`."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from yaml_flags(value, f"{prefix}{key}.")
            continue
        yield f"{prefix}{key}"
        for item in value if isinstance(value, list) else [value]:
            is_like_flag = isinstance(item, str) and item.startswith("-")
            yield YAML_MARK + item if is_like_flag else str(item)


@REGISTRY.primitive_rule
def bool_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Accept booleans in YAML or Python spelling; a flag without a value is true."""
    if info.type is not bool:
        return None
    return PrimitiveConstructorSpec(
        nargs=(0, 1), metavar="{true,false}", choices=("true", "false", "True", "False"),
        is_instance=lambda value: isinstance(value, bool),
        instance_from_str=lambda words: words not in (["false"], ["False"]),
        str_from_instance=lambda value: [str(value).lower()])


@REGISTRY.primitive_rule
def str_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    r"""Show newlines in default values as \n, read marked strings of a YAML file, and replace ~/
    by the home folder."""
    if info.type is not str:
        return None

    def parse(words: list[str]) -> str:
        word = words[0].removeprefix(YAML_MARK)
        return os.path.expanduser(word) if word.startswith("~/") else word

    return PrimitiveConstructorSpec(
        nargs=1, metavar="STR", is_instance=lambda value: isinstance(value, str),
        instance_from_str=parse,
        str_from_instance=lambda value: [value.replace("\n", "\\n")])
