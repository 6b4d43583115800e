"""Training speed of scripts.train against nanoGPT's model and optimizer:
python -m benchmarks.peers --nanogpt PATH

PATH is a checkout of github.com/karpathy/nanoGPT. The two alternate, each in a separate process.
On a CPU nanoGPT trains in float32 by default, ours in bf16 where it is native: both run in both.
Other flags go to benchmarks.bench, such as --optimizer muon.
"""

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.compare import compare, rate

SHAPES = ["4,192,6,2048,8,128", "4,128,4,50257,8,256"]
if torch.cuda.is_available():
    SHAPES = ["12,768,12,50257,16,1024", "12,768,12,50257,64,1024"]
FLAGS = ("model.n_layer", "model.n_embd", "model.n_head", "model.vocab_size", "micro_batch_size",
         "seq_len")
STEPS, WARMUP = 10, 3


def nanogpt(path: str, n_layer: int, n_embd: int, n_head: int, vocab_size: int, B: int,
            T: int, *, use_bf16: bool) -> float:
    """Return the median tokens/s of nanoGPT's training step on random tokens, compiled on CUDA, as
    in its train.py, which rounds the vocabulary up and uses bfloat16 on CUDA, float32 on CPUs; with
    biases, as in GPT-2."""
    sys.path.insert(0, path)
    nano = importlib.import_module("model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    padded_size = -(-vocab_size // 64) * 64
    shape = nano.GPTConfig(block_size=T, vocab_size=padded_size, n_layer=n_layer, n_head=n_head,
                           n_embd=n_embd, dropout=0.0, bias=True)
    model: Any = nano.GPT(shape).to(device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device)
    model = torch.compile(model) if device == "cuda" else model
    tokens = torch.randint(vocab_size, (B, T + 1), device=device)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    seconds = []
    for _ in range(WARMUP + STEPS):
        t0 = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=use_bf16):
            _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()  # waits for the device
        seconds.append(time.perf_counter() - t0)
    return B * T / statistics.median(seconds[WARMUP:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nanogpt", required=True)
    parser.add_argument("--shape", nargs="+", default=SHAPES,
                        help="n_layer,n_embd,n_head,vocab_size,batch,length")
    parser.add_argument("--rounds", type=int, default=3)
    # Run nanoGPT in this process.
    parser.add_argument("--peer", choices=["float32", "bf16"], help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    for shape in args.shape:
        sizes = list(map(int, shape.split(",")))
        if args.peer:
            print(nanogpt(args.nanogpt, *sizes, use_bf16=args.peer == "bf16"))
            continue
        words = [f"--{flag}={size}" for flag, size in zip(FLAGS, sizes, strict=True)]
        words += ["--total_batch_size", str(sizes[4] * sizes[5]), "--num_repeats", str(STEPS)]
        variants: dict[str, Callable[[], float]] = {}
        for precision in ["bf16"] if torch.cuda.is_available() else ["float32", "bf16"]:
            variants[f"nanoGPT, {precision}"] = partial(
                rate, "benchmarks.peers", "--peer", precision, "--nanogpt", args.nanogpt,
                "--shape", shape)
            variants[f"ours, {precision}"] = partial(
                rate, "benchmarks.bench", "train", *words, "--precision", precision, *flags)
        compare(shape, "tokens/s", variants, args.rounds)


if __name__ == "__main__":
    main()
