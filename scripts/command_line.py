"""What all commands share: a dataclass becomes the flags, and a user's mistake one line and exit status 2."""

import difflib
import os
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

import jsonargparse

from gpt.errors import UserError


class Parser(jsonargparse.ArgumentParser):
    """Says what is wrong with the flags in one line, without the usage of forty options before it."""

    def error(self, message: str, ex: Exception | None = None) -> None:
        message = re.sub(r'Parser key "([^"]+)":', r"--\1:", " ".join(str(message).split()))
        message = re.sub(r"<class '(\w+)'>", r"\1", message)
        if "unrecognized arguments" in message:
            flag = re.search(r"--[^\s=]+", message)
            near = difflib.get_close_matches(flag[0], self._option_string_actions, 1) if flag else []
            message += f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"error: {message} (--help lists all options)\n")


def run(main: Callable[[Any], int | None], config_class: type) -> None:
    """Parse the command line into `config_class`, call `main` with it, and exit with the status it returns.

    Every field is a flag and a key of a `--config` YAML file; flags override the file, whatever their order.
    """
    spec = sys.modules["__main__"].__spec__
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = Parser(prog=f"python -m {spec.name}" if spec else f"python {sys.argv[0]}", allow_abbrev=False,
                    description=(sys.modules["__main__"].__doc__ or "").strip())
    parser.add_argument("--config", action="config", help="YAML file of settings; flags override it")
    parser.add_class_arguments(config_class)
    try:
        settings = vars(parser.instantiate(parser.parse_args(config_first(sys.argv[1:]))))
        settings.pop("config")
        status = main(config_class(**settings))
        sys.stdout.flush()
    except UserError as error:
        rank = int(os.environ.get("RANK", 0))
        print(f"error: {error}" if rank == 0 else f"error (rank {rank}): {error}", file=sys.stderr)
        status = 2
    except BrokenPipeError:  # the reader, `head` say, has seen enough; nothing more may be written, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)


def config_first(words: list[str]) -> list[str]:
    """The command line with `--config FILE` moved to the front: jsonargparse lets later settings win."""
    files, flags = [], []
    for i, word in enumerate(words):
        is_config = word == "--config" or word.startswith("--config=") or (i > 0 and words[i - 1] == "--config")
        (files if is_config else flags).append(word)
    return files + flags
