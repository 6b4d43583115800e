"""Training steps on the CPU with gpt/loss.py against F.cross_entropy over all logits:
python -m benchmarks.loss"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.compare import compare
from gpt.config import GPTConfig
from gpt.model import GPT
from gpt.optim import configure_optimizer


def bench(title: str, config: GPTConfig, B: int, rounds: int, dtype: torch.dtype) -> None:
    """Compare full training steps on B sequences under autocast to `dtype`."""
    torch.manual_seed(0)
    model = GPT(config)
    optimizer = configure_optimizer(model, "adamw", lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95))
    tokens = torch.randint(config.vocab_size, (B, config.block_size + 1))
    x, y = tokens[:, :-1], tokens[:, 1:]

    def step(loss: Callable[[], torch.Tensor]) -> float:
        t0 = time.perf_counter()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return y.numel() / (time.perf_counter() - t0)

    def all_logits() -> torch.Tensor:
        return F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten())

    ways = {"all logits": lambda: step(all_logits),
            "gpt/loss.py": lambda: step(lambda: model(x, y))}
    for way in ways.values():
        way()  # warm-up
    compare(f"{title}, {str(dtype).removeprefix('torch.')}", "tokens/s", ways, rounds)


if __name__ == "__main__":
    small = GPTConfig(block_size=128, n_layer=4, n_head=4, n_embd=128)
    for dtype in (torch.float32, torch.bfloat16):
        bench("4 x 128, batch 8 x 128", small, 8, 12, dtype)
        bench("GPT-2 124M, batch 4 x 256", GPTConfig(block_size=256), 4, 5, dtype)
