"""Write text with a trained model: python -m scripts.generate --prompt "Once upon a time"

Without --prompt a terminal asks for one prompt after another; the k-th, from 0, draws with seed + k, so that a session
can be repeated. Elsewhere, in a pipe say, the prompt is then a newline. <|endoftext|> in a prompt is the token.
"""

import contextlib
import os
import sys
from dataclasses import dataclass, replace
from typing import Literal

import tiktoken
import torch

from gpt.distributed import select_device
from gpt.errors import UserError
from gpt.generation import stream
from gpt.model import GPT
from scripts import command_line


@dataclass
class GenerateConfig(command_line.CheckpointConfig):
    """Settings of scripts.generate."""

    prompt: str = "\n"
    """text to continue; a newline: ask on a terminal"""
    max_new_tokens: int = 200
    """tokens to write after the prompt"""
    num_samples: int = 1
    """texts to write for a prompt"""
    temperature: float = 0.8
    """0: always the likeliest token; higher: bolder"""
    top_k: int = 200
    """draw among the k likeliest tokens; 0: all"""
    top_p: float = 1.0
    """total probability of the tokens to draw among"""
    seed: int = 1337
    """the same seed draws the same text"""
    device: str = "auto"
    """auto, cuda, mps or cpu"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the weights; bfloat16: half the memory"""


def main(config: GenerateConfig) -> None:
    """Load a checkpoint and continue the prompt; which checkpoint it was goes to standard error."""
    check(config)
    device = select_device(config.device)
    _, model, encoding = command_line.load_model(config, device)
    model = model.to(getattr(torch, config.dtype))
    # None for "not given" would not do: on a command line jsonargparse takes `null` and `# Title` for None too
    asks = config.prompt == GenerateConfig.prompt and os.isatty(0) and os.isatty(1)
    (converse if asks else write)(config, model, encoding)


def converse(config: GenerateConfig, model: GPT, encoding: tiktoken.Encoding) -> None:
    """Ask for prompts and continue each, until Ctrl-D; an empty one is a newline."""
    with contextlib.suppress(ImportError):  # not on every system
        import readline  # noqa: F401  # gives input() its editing and its history
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]  # a stray byte is not worth the session
    print("type a prompt, or Enter for none; Ctrl-C stops a text, Ctrl-D leaves", file=sys.stderr)
    seed = config.seed
    while True:
        try:
            asked = replace(config, prompt=input("> ") or "\n", seed=seed)
            seed += 1
            write(asked, model, encoding)
        except UserError as error:
            command_line.say(str(error))
        except KeyboardInterrupt:  # ends the text or the line that it was pressed in
            print()
        except EOFError:
            print()  # the shell's prompt gets a line of its own
            return


def write(config: GenerateConfig, model: GPT, encoding: tiktoken.Encoding) -> None:
    """Print `num_samples` texts that begin with the prompt, the first one as it is written."""
    texts: list[list[str]] = [[] for _ in range(config.num_samples)]
    for pieces in stream(model, encoding, [config.prompt] * config.num_samples, config.max_new_tokens,
                         temperature=config.temperature, top_k=config.top_k, top_p=config.top_p, seed=config.seed):
        print(pieces[0], end="", flush=True)
        for text, piece in zip(texts, pieces, strict=True):
            text.append(piece)
    print()
    for text in texts[1:]:
        print(f"---\n{''.join(text)}")


def check(config: GenerateConfig) -> None:
    """Raise UserError for a value that cannot be meant."""
    for name in ("temperature", "top_k", "seed"):
        if not 0 <= getattr(config, name) < 2**63:
            raise UserError(f"{name} is {getattr(config, name)}: it must be 0 or more, and below 2^63")
    for name in ("max_new_tokens", "num_samples"):
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}: it must be 1 or more")
    if not 0 < config.top_p <= 1:
        raise UserError(f"top_p is {config.top_p}: it must be above 0 and at most 1")
    if not config.prompt:
        raise UserError("the prompt is empty: pass some text, or leave --prompt out")


if __name__ == "__main__":
    command_line.run(main, GenerateConfig)
