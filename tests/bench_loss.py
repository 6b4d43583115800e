"""Whole training steps through gpt/loss.py and through the plain formula, in pairs: python -m tests.bench_loss"""

import statistics
import time

import torch
import torch.nn.functional as F

from gpt.config import GPTConfig
from gpt.model import GPT
from gpt.optim import configure_optimizers


def bench(name: str, config: GPTConfig, B: int, pairs: int, bf16: bool = False) -> None:
    """Print tokens per second of both, medians over `pairs` alternating steps after one that is not counted."""
    torch.manual_seed(0)
    model = GPT(config)
    (optimizer,) = configure_optimizers(model, "adamw", lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    tokens = torch.randint(config.vocab_size, (B, config.block_size + 1))
    x, y = tokens[:, :-1], tokens[:, 1:]
    losses = {"gpt/loss.py": lambda: model(x, y),
              "plain formula": lambda: F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())}
    seconds = {how: [] for how in losses}
    for _ in range(pairs + 1):
        for how, loss in losses.items():
            began = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds[how].append(time.perf_counter() - began)
    speeds = [f"{how} {y.numel() / statistics.median(times[1:]):,.0f} tokens/s" for how, times in seconds.items()]
    print(f"{name}: {', '.join(speeds)}", flush=True)


if __name__ == "__main__":
    bench("4 x 128, batch 8 x 128", GPTConfig(block_size=128, n_layer=4, n_head=4, n_embd=128), B=8, pairs=12)
    bench("GPT-2 124M, batch 4 x 256", GPTConfig(block_size=256), B=4, pairs=5)
    bench("4 x 128, batch 8 x 128, bf16", GPTConfig(block_size=128, n_layer=4, n_head=4, n_embd=128), B=8, pairs=12,
          bf16=True)
    bench("GPT-2 124M, batch 8 x 256, bf16", GPTConfig(block_size=256), B=8, pairs=5, bf16=True)
