"""What all commands share: a dataclass becomes the flags, and a user's mistake one line and exit status 2."""

import ast
import contextlib
import difflib
import inspect
import json
import os
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, NamedTuple, NoReturn, get_origin

import jsonargparse
import yaml

from gpt.errors import DISK_FULL, UserError


@dataclass(kw_only=True)
class CheckpointConfig:
    """Settings of all commands that use a trained model."""

    # The model
    checkpoint: str | None = None
    """a model_<step>.pt, a folder or name of Hugging Face"""
    log_dir: str = "log"
    """without checkpoint: the newest of this run"""


class Parser(jsonargparse.ArgumentParser):
    """Says in one line what is wrong with the flags, without forty options before it, and shows these as a table."""

    config_class: type
    positional: str

    def format_help(self, formatter: Any = None) -> str:
        word = f" [{self.positional.upper()}]" if self.positional else ""
        about = (textwrap.fill(paragraph, 80) for paragraph in (self.description or "").split("\n\n"))
        lines = [f"usage: {self.prog}{word} [--config FILE] [--OPTION VALUE ...]", "", "\n\n".join(about), "",
                 "  --config FILE         YAML file of settings; flags win over it",
                 "  --print_config        show all settings as YAML, and leave"]
        heading = None
        for option in options(self.config_class):
            if option.heading != heading:
                lines += ["", heading := option.heading]
            lines.append(f"  --{option.name:<20}{'' if len(option.name) < 20 else ' '}{option.words}{option.default}")
        return "\n".join(lines) + "\n"

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        message = re.sub(r'Parser key "([^"]+)":', r"--\1:", " ".join(str(message).split()))
        message = re.sub(r"<class '(\w+)'>", r"\1", message)
        if "unrecognized arguments" in message:
            flag = re.search(r"--[^\s=]+", message)
            near = difflib.get_close_matches(flag[0], self._option_string_actions, 1) if flag else []
            message += f"; did you mean {near[0]}?" if near else ""
        say(f"{message} (--help lists all options)")
        sys.exit(2)


class Option(NamedTuple):
    """A line of --help: the comment above a group of fields, a field's name, its docstring and its default."""

    heading: str
    name: str
    words: str
    default: str


def options(config_class: type, values: Any = None, prefix: str = "", heading: str = "Options") -> Iterator[Option]:
    """The options of a settings dataclass, as its source has them, those of its base classes last.

    values: an instance with the defaults, instead of the class's own. prefix and heading: for a dataclass in another.
    """
    there = {each.name: each for each in fields(config_class)}
    for cls in filter(is_dataclass, config_class.__mro__):
        field = None
        for line in inspect.getsource(cls).splitlines():
            if comment := re.fullmatch(r"    # (.+)", line):
                heading = comment[1]
            elif declared := re.match(r"    (\w+): ", line):
                field = there.pop(declared[1], None)
            elif field and line.startswith('    """'):
                default = getattr(values, field.name) if values else field.default
                if default is MISSING and field.default_factory is not MISSING:
                    default = field.default_factory()
                if is_dataclass(default):
                    yield from options(type(default), default, f"{field.name}.", heading)
                else:
                    yield Option(heading, prefix + field.name, ast.literal_eval(line.strip()), shown(default))
                field = None


def shown(default: Any) -> str:
    """A default as it is typed, in brackets."""
    if default is MISSING:
        return " (required)"
    values = default if isinstance(default, list | tuple) else [default]
    texts = (json.dumps(value) if isinstance(value, bool) else repr(value) if value in ("", "\n") else
             f"{value:g}" if isinstance(value, float) else str(value) for value in values)
    words = (", " if isinstance(default, tuple) else " ").join(texts)
    return f" [{words}]" if words and default is not None else ""


def run(main: Callable[[Any], int | None], config_class: type, positional: str = "") -> None:
    """Parse the command line into `config_class`, call `main` with it, and exit with the status it returns.

    Every field is a flag and a key of a `--config` YAML file; flags override the file, whatever their order.
    positional: a field whose flag may be left out before the first word.
    """
    with contextlib.suppress(AttributeError, OSError):  # a character that a console lacks must not end a run
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    spec = sys.modules["__main__"].__spec__
    parser = Parser(prog=f"python -m {spec.name}" if spec else f"python {sys.argv[0]}", allow_abbrev=False,
                    description=(sys.modules["__main__"].__doc__ or "").strip())
    parser.config_class, parser.positional = config_class, positional
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(config_class)
    try:
        try:
            words = sys.argv[1:]
            if positional and words and not words[0].startswith("-"):
                words.insert(0, f"--{positional}")
            arguments = parser.parse_args([*with_values(config_first(words), config_class, f"--{positional}")])
        except UnicodeDecodeError:
            parser.error("--config: not a text file")
        settings = vars(parser.instantiate(arguments))
        settings.pop("config")
        status = main(config_class(**settings))
        sys.stdout.flush()
    except UserError as error:
        say(str(error))
        status = 2
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        discard_output()
        status = 128 + signal.SIGPIPE
    except OSError as error:  # of the disk: a fault that the user can put right
        if error.filename is None and error.errno not in DISK_FULL:
            raise
        advice = ": make room and run it again" if error.errno in DISK_FULL else ""
        say(f"{error.filename or 'standard output'}: {error.strerror}{advice}")
        discard_output()
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def say(message: str) -> None:
    """Print an error, once for all processes of torchrun."""
    rank, group = int(os.environ.get("RANK", 0)), sys.modules.get("torch.distributed")
    if int(os.environ.get("LOCAL_RANK", 0)) > 0 and not (group and group.is_initialized()):
        time.sleep(10)  # local rank 0 finds the same mistake in the same flags, and torchrun then ends this process
    print(f"error: {message}" if rank == 0 else f"error (rank {rank}): {message}", file=sys.stderr)


def discard_output() -> None:
    """Have nothing more written to standard output, not even what is left for the end of the process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def config_first(words: list[str]) -> list[str]:
    """The command line with `--config FILE` moved to the front: jsonargparse lets later settings win."""
    files: list[str] = []
    flags: list[str] = []
    for i, word in enumerate(words):
        is_config = word == "--config" or word.startswith("--config=") or (i > 0 and words[i - 1] == "--config")
        (files if is_config else flags).append(word)
    return files + flags


def with_values(words: list[str], config_class: type, positional: str) -> Iterator[str]:
    """The command line as jsonargparse takes it: `--input a b` becomes a JSON list, `--merge` alone `--merge true`, and
    words that follow the value of another flag belong to `positional` if that is a list."""
    kinds = {f"--{each.name}": each.type for each in fields(config_class)}
    groups: list[list[str]] = []
    for word in words:
        flag, equals, value = word.partition("=")
        if equals and get_origin(kinds.get(flag)) is list:
            groups.append([flag, value])
        elif word.startswith("--") or word == "-h" or not groups:
            groups.append([word])
        else:
            groups[-1].append(word)
    lists: dict[str, list[str]] = {}  # a list may be given in several goes
    for flag, *values in groups:
        if get_origin(kinds.get(flag)) is list and values:
            one = len(values) == 1 and values[0].startswith("[") and isinstance(as_yaml(values[0]), list)
            lists.setdefault(flag, []).extend(map(str, as_yaml(values[0])) if one else values)
        elif kinds.get(flag) is bool and not values:
            yield from (flag, "true")
        else:
            own = 0 if "=" in flag else 1
            if len(values) > own and get_origin(kinds.get(positional)) is list:
                lists.setdefault(positional, []).extend(values[own:])
                values = values[:own]
            yield from (flag, *values)
    for flag, values in lists.items():
        yield from (flag, json.dumps(values))


def as_yaml(text: str) -> Any:
    """What YAML makes of a text; None if it is none."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return None


def find_checkpoint(config: CheckpointConfig, note: str = "") -> tuple[str, dict]:
    """Name and content of the checkpoint to use; a line on standard error names it, with a `note` at its end.

    Raises UserError if there is none."""
    from gpt import checkpoint  # PyTorch takes seconds, and prepare_shakespeare.py does without

    if (source := config.checkpoint) is not None:
        content = checkpoint.load(source)
    elif newest := checkpoint.newest(config.log_dir, report=lambda line: print(line, file=sys.stderr)):
        source, content = str(newest[0]), newest[1]
    else:
        raise UserError(f"no checkpoint in log_dir {config.log_dir!r}: train one with `python -m scripts.train`, or "
                        f"pass --checkpoint")
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"{source}: step {content['step']}{note}" if content["step"] else source + note, file=sys.stderr)
    return source, content


def load_model(config: CheckpointConfig, device: Any, note: str = "") -> tuple[str, Any, Any]:
    """Name, model (a `gpt.model.GPT` on `device`, in evaluation mode) and tokenizer (a `tiktoken.Encoding`) of a
    checkpoint, see `find_checkpoint`. Raises UserError, also for a checkpoint without a tokenizer."""
    from gpt.model import GPT
    from gpt.tokenizer import get_tokenizer

    source, content = find_checkpoint(config, note)
    if not content.get("tokenizer"):
        raise UserError(f"{source} was trained on token ids of no known tokenizer: it can be used from Python only")
    return source, GPT.from_checkpoint(content).to(device).eval(), get_tokenizer(content["tokenizer"])
