"""Compare our GPT-2 with transformers' on the same weights:
python -m scripts.validate --model gpt2 --prompt "Hi" """

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from gpt.checkpoint import load_checkpoint
from gpt.errors import UserError
from gpt.generation import generate
from gpt.model import GPT
from gpt.pretrained import load_hf_model, save_pretrained
from gpt.tokenizer import Tokenizer
from scripts import cli

TOLERANCE = 1e-4  # of logits in float32


@dataclass
class ValidateConfig:
    """Settings of scripts.validate."""

    # model_<step>.pt, run folder, Hugging Face folder or model name
    model: Annotated[str, tyro.conf.arg(aliases=["--checkpoint"])]
    prompt: str = "Hello world"  # text to continue with both models
    max_new_tokens: int = 20  # new tokens per greedy continuation
    top: int = 5  # most likely next tokens to print


def main(config: ValidateConfig) -> int:
    """Print next tokens, greedy continuations and logit difference;
    return 0 if the models agree, else 1."""
    if config.max_new_tokens < 1 or config.top < 1:
        raise UserError(f"--max_new_tokens is {config.max_new_tokens} and --top is {config.top}: "
                        f"must be 1 or more")
    checkpoint = load_checkpoint(config.model)
    model = GPT.from_checkpoint(checkpoint).eval()
    tokenizer = Tokenizer(checkpoint.get("tokenizer") or "gpt2")
    block_size, vocab_size = model.config.block_size, model.config.vocab_size
    prompt = tokenizer.encode(config.prompt, allow_special=True)
    if not 0 < len(prompt) < block_size or max(prompt) >= vocab_size:
        raise UserError(f"--prompt has {len(prompt)} tokens: pass 1 or more, fewer than block_size "
                        f"{block_size}, with ids below vocab_size {vocab_size}")
    from transformers import GenerationConfig  # takes seconds

    if Path(config.model).is_file() or any(Path(config.model).glob("model_[0-9]*.pt")):
        with tempfile.TemporaryDirectory() as folder:
            exported = {**checkpoint, "model": model.state_dict(), "tokenizer": None}
            save_pretrained(exported, Path(folder))
            hf_model, _ = load_hf_model(folder)
    else:
        hf_model, _ = load_hf_model(config.model)
    # Plain greedy decoding, whatever the folder says.
    hf_model.generation_config = GenerationConfig()
    idx = torch.tensor([prompt])  # (1, T)
    with torch.no_grad():
        our_logits, hf_logits = model(idx)[0], hf_model(idx).logits[0]  # (T, vocab_size)
    n = min(config.max_new_tokens, block_size - len(prompt))
    our_tokens = [token for token, in generate(model, [prompt], n, temperature=0)]
    hf_tokens = hf_model.generate(idx, do_sample=False, max_new_tokens=n)[0, len(prompt):].tolist()
    for name, logits, tokens in (("ours", our_logits, our_tokens),
                                 ("transformers", hf_logits, hf_tokens)):
        print(f"{name}: {decode(tokenizer, prompt + tokens)!r}")
        probs, top_tokens = logits[-1].softmax(0).topk(min(config.top, vocab_size))
        for prob, token in zip(probs.tolist(), top_tokens.tolist(), strict=True):
            print(f"{prob:10.4%} {decode(tokenizer, [token])!r}")
    difference = (our_logits - hf_logits).abs().max().item()
    agree = difference <= TOLERANCE and our_tokens == hf_tokens
    print(f"largest difference among {our_logits.numel():,} logits: {difference:.2e}, "
          f"expected at most {TOLERANCE:g}")
    print(f"the models {'agree' if agree else 'DISAGREE'}")
    return 0 if agree else 1


def decode(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """Return token ids as text, skipping ids that only pad the model's vocabulary."""
    return tokenizer.decode(token for token in tokens if token < tokenizer.n_vocab)


if __name__ == "__main__":
    cli.run_cli(main, ValidateConfig)
