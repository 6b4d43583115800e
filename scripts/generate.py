"""Generate text with a trained model: python -m scripts.generate --prompt "Once upon a time"

Without --prompt it asks for prompts on a terminal, and reads one a line from a pipe; prompt k (from
0) uses seed + k. Texts are separated by a line <|endoftext|>; in a prompt it is the special token.
"""

import contextlib
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from gpt.checkpoint import CheckpointConfig, load_model
from gpt.device import select_device, select_precision
from gpt.errors import UserError
from gpt.generation import prepare_for_inference, stream_text
from gpt.model import GPT
from gpt.tokenizer import END_OF_TEXT, Tokenizer
from scripts import cli


@dataclass
class GenerateConfig(CheckpointConfig):
    """Settings of scripts.generate."""

    prompt: str = "\n"  # text to continue; a newline: ask for prompts, or read a pipe
    max_new_tokens: int = 200  # new tokens per sample
    num_samples: int = 1  # samples per prompt
    temperature: float = 0.8  # sampling temperature; 0: greedy, higher: more random
    top_k: int = 200  # sample from the k most likely tokens; 0: all
    top_p: float = 1.0  # nucleus sampling threshold; 1: off
    seed: int = 1337  # random seed for sampling
    device: str = "auto"  # auto, cuda, mps or cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 if native, else float32


def main(config: GenerateConfig) -> None:
    """Continue the prompt with a checkpoint, whose name goes to standard error."""
    check_config(config)
    device, dtype = select_device(config.device), config.dtype
    if dtype == "auto":
        dtype = "bfloat16" if select_precision("auto", device) == "bf16" else "float32"
    _, model, tokenizer = load_model(config, device)
    prepare_for_inference(model, getattr(torch, dtype))
    # The default is not None, because tyro parses the prompt `None` as None.
    prompts: Iterable[str] = [config.prompt]
    if config.prompt == GenerateConfig.prompt:
        # An invalid byte in a prompt must not end the session.
        sys.stdin.reconfigure(errors="replace", newline=None)  # type: ignore[union-attr]
        if os.isatty(0) and os.isatty(1):
            return run_interactive(config, model, tokenizer)
        if not os.isatty(0):  # without input, as under cron, readline returns ""
            lines = itertools.chain([sys.stdin.readline()], sys.stdin)
            prompts = (line.rstrip("\n") or "\n" for line in lines)
    for k, prompt in enumerate(prompts):
        if k > 0:
            print(END_OF_TEXT)
        print_samples(replace(config, prompt=prompt, seed=config.seed + k), model, tokenizer)


def run_interactive(config: GenerateConfig, model: GPT, tokenizer: Tokenizer) -> None:
    """Ask for prompts and continue each until Ctrl-D; an empty prompt is a newline."""
    with contextlib.suppress(ImportError):  # not on every system
        import readline  # noqa: F401  # gives input() line editing and history
    print("type a prompt, or Enter for none; Ctrl-C stops a sample, Ctrl-D exits", file=sys.stderr)
    seed = config.seed
    interrupts: list[int] = []
    while True:
        try:
            turn_config = replace(config, prompt=input("> ") or "\n", seed=seed)
            seed += 1
            interrupts.clear()
            # Not KeyboardInterrupt, which can get lost inside a library's call.
            signal.signal(signal.SIGINT, lambda signum, frame: interrupts.append(signum))
            print_samples(turn_config, model, tokenizer, stopped=lambda: bool(interrupts))
        except UserError as error:
            cli.print_error(str(error))
        except KeyboardInterrupt:  # ends the input line
            print()
        except EOFError:
            print()  # the shell's prompt gets its own line
            return
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def print_samples(config: GenerateConfig, model: GPT, tokenizer: Tokenizer,
                  stopped: Callable[[], bool] = lambda: False) -> None:
    """Print `num_samples` continuations of the prompt, of which the first one is streamed, until
    `stopped`, called after each token, is true."""
    later_samples = []
    for pieces in stream_text(model, tokenizer, [config.prompt] * config.num_samples,
                              config.max_new_tokens, temperature=config.temperature,
                              top_k=config.top_k, top_p=config.top_p, seed=config.seed):
        print(pieces[0], end="", flush=True)
        later_samples.append(pieces[1:])
        if stopped():
            break
    texts = map("".join, zip(*later_samples, strict=True))
    print("".join(f"\n{END_OF_TEXT}\n{text}" for text in texts))


def check_config(config: GenerateConfig) -> None:
    """Raise UserError for an invalid setting."""
    for name, least in (("temperature", 0), ("top_k", 0), ("seed", 0), ("max_new_tokens", 1),
                        ("num_samples", 1)):
        value = getattr(config, name)
        if not least <= value < 2**63:
            raise UserError(f"--{name} is {value}: must be {least} or more, and below 2^63")
    if not 0 < config.top_p <= 1:
        raise UserError(f"--top_p is {config.top_p}: must be above 0 and at most 1")
    if not config.prompt:
        raise UserError("--prompt is empty: pass some text or omit the flag")


if __name__ == "__main__":
    cli.run_cli(main, GenerateConfig)
