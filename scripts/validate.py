"""Compare our GPT-2 with transformers' on the same weights: python -m scripts.validate --model gpt2 --prompt "Hi" """

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt import checkpoint, pretrained
from gpt.errors import UserError
from gpt.generation import generate
from gpt.model import GPT
from gpt.tokenizer import Tokenizer
from scripts import cli

TOLERANCE = 1e-4  # of logits in float32


@dataclass
class ValidateConfig:
    """Settings of scripts.validate."""

    model: str  # a model_<step>.pt, or a Hugging Face folder or name
    prompt: str = "Hello world"  # text to continue with both models
    max_new_tokens: int = 20  # new tokens per greedy continuation
    top: int = 5  # most likely next tokens to print


def main(config: ValidateConfig) -> int:
    """Print the comparison; returns 0 if the models agree, else 1."""
    if config.max_new_tokens < 1 or config.top < 1:
        raise UserError(f"max_new_tokens is {config.max_new_tokens} and top is {config.top}: both must be 1 or more")
    content = checkpoint.load_checkpoint(config.model)
    ours = GPT.from_checkpoint(content).eval()
    tokenizer = Tokenizer(content.get("tokenizer") or "gpt2")
    prompt = tokenizer.encode(config.prompt, allow_special=True)
    room = ours.config.block_size - len(prompt)
    if not prompt or room < 1 or max(prompt) >= ours.config.vocab_size:
        raise UserError(f"the prompt has {len(prompt)} tokens: it must have at least one and fewer than block_size "
                        f"{ours.config.block_size}, with ids below vocab_size {ours.config.vocab_size}")
    from transformers import GenerationConfig, GPT2LMHeadModel, logging  # seconds

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if Path(config.model).is_file():
            pretrained.save(content, folder)
        else:
            folder = pretrained.find_folder(config.model)
        theirs = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    theirs.generation_config = GenerationConfig()  # not what the folder has, such as a penalty for repetition

    with torch.no_grad():
        idx = torch.tensor([prompt])
        logits, reference = ours(idx)[0], theirs(idx).logits[0]  # each (T, vocab_size)
    difference = (logits - reference).abs().max().item()
    def text(tokens: list) -> str:
        return tokenizer.decode(token for token in tokens if token < tokenizer.n_vocab)  # some vocabularies are padded

    print(f"{config.model}: largest difference of {logits.numel():,} logits: {difference:.2e}")
    print(f"\n{'here':<30} transformers")
    tops = [each[-1].softmax(0).topk(min(config.top, ours.config.vocab_size)) for each in (logits, reference)]
    for row in range(len(tops[0].values)):
        cells = [f"{top.values[row].item():8.4%} {text([top.indices[row].item()])!r:<20}" for top in tops]
        print(" ".join(cells).rstrip())

    new_tokens = min(config.max_new_tokens, room)
    stop = tokenizer.end_of_text
    mine = [token for token, in generate(ours, [prompt], new_tokens, temperature=0, stop_token=stop)]
    other = theirs.generate(idx, attention_mask=torch.ones_like(idx), do_sample=False, max_new_tokens=new_tokens,
                            eos_token_id=stop, pad_token_id=stop)[0, len(prompt):].tolist()
    print(f"\nhere:         {text(prompt + mine)!r}\ntransformers: {text(prompt + other)!r}\n")
    agree = difference <= TOLERANCE and mine == other
    print(f"they {'agree' if agree else 'DISAGREE'}: expected are logits that differ by at most {TOLERANCE:g}, and the "
          f"same {new_tokens} greedy tokens")
    return 0 if agree else 1


if __name__ == "__main__":
    cli.run_cli(main, ValidateConfig)
