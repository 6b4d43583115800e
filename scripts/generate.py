"""Write text with a trained model: python -m scripts.generate --prompt "Once upon a time" """

from dataclasses import dataclass
from typing import Literal

import torch

from gpt.distributed import select_device
from gpt.errors import UserError
from gpt.generation import stream
from scripts import command_line


@dataclass
class GenerateConfig(command_line.CheckpointConfig):
    """Settings of scripts.generate."""

    prompt: str = "\n"
    """beginning of the text; <|endoftext|> in it is the token"""
    max_new_tokens: int = 200
    """tokens to write, beyond those of the prompt"""
    num_samples: int = 1
    """number of texts to write"""
    temperature: float = 0.8
    """above 1: more surprising, below: safer; 0: always the most likely token"""
    top_k: int = 200
    """choose among the k most likely tokens; 0: all"""
    top_p: float = 1.0
    """choose among the most likely tokens that together have this probability"""
    seed: int = 1337
    """of the draws: the same seed writes the same text"""
    device: str = "auto"
    """auto, cuda, mps or cpu"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """type of the weights; bfloat16 has half the size and three digits"""


def main(config: GenerateConfig) -> None:
    """Load a checkpoint and print continuations of the prompt, the first one as it is written; which checkpoint it was
    goes to standard error."""
    check(config)
    device = select_device(config.device)
    _, model, encoding = command_line.load_model(config, device)
    texts: list[list[str]] = [[] for _ in range(config.num_samples)]
    for pieces in stream(model.to(getattr(torch, config.dtype)), encoding, [config.prompt] * config.num_samples,
                         config.max_new_tokens, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
                         seed=config.seed):
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
