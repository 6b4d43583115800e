"""Measure the perplexity of a text under a model:
python -m scripts.eval_perplexity --data my_text.txt"""

import math
import os
import sys
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from gpt.checkpoint import CheckpointConfig, load_model
from gpt.device import select_device
from gpt.errors import UserError
from gpt.evaluation import sliding_window_losses
from gpt.generation import prepare_for_inference
from gpt.shards import list_shards, read_meta, read_tokenizer, read_tokens, stat_shard
from gpt.text_files import TextConfig, find_sources, read_batches
from gpt.tokenizer import Tokenizer
from scripts import cli


@dataclass
class PerplexityConfig(CheckpointConfig):
    """Settings of scripts.eval_perplexity."""

    data: str  # folder with val_*.npy, or a text file, folder or pattern; -: standard input
    stride: int = 0  # tokens between sliding windows; 0: half the context
    batch_size: int = 4  # sliding windows per forward pass; lower if out of memory
    device: str = "auto"  # auto, cuda, mps or cpu


def main(config: PerplexityConfig) -> None:
    """Print the loss, the perplexity and the bits per byte of all tokens but the first."""
    device = select_device(config.device)
    _, model, tokenizer = load_model(config, device)
    prepare_for_inference(model, torch.float32)
    T = model.config.block_size
    stride = config.stride or max(T // 2, 1)
    if not 1 <= stride <= T or config.batch_size < 1:
        raise UserError(f"--stride is {stride} and --batch_size is {config.batch_size}: expected "
                        f"a stride of 1 to {T} (the model's context length) and a batch size "
                        f"of 1 or more")
    shards = [tokens for tokens in read_data(config.data, tokenizer) if len(tokens) > 1]
    if not shards:
        raise UserError(f"--data {config.data} has fewer than two tokens: pass a longer text")
    token_lengths = tokenizer.token_lengths(model.config.vocab_size)
    nats, n_tokens, n_bytes = 0.0, 0, 0
    with tqdm(total=sum(map(len, shards)), unit="token", unit_scale=True,
              mininterval=0.1 if sys.stderr.isatty() else 30) as bar:
        for tokens in shards:
            for losses, targets in sliding_window_losses(model, tokens, stride, config.batch_size):
                nats += losses.sum()
                n_tokens += len(targets)
                n_bytes += token_lengths[targets].sum()
                bar.update(len(targets))
    loss, bits_per_byte = nats / n_tokens, nats / math.log(2) / max(n_bytes, 1)
    print(f"{n_tokens:,} tokens, {n_bytes:,} bytes | {loss:.4f} nats per token | perplexity "
          f"{math.exp(min(loss, 700)):.4f} | {bits_per_byte:.4f} bits per byte | stride {stride}")


def read_data(data: str, tokenizer: Tokenizer) -> list[np.ndarray]:
    """Return the token ids of text as `scripts.prepare` encodes it, or of each val shard in a
    folder.

    Raises UserError if there are none.
    """
    if os.path.isdir(data) and list_shards(data, "val"):
        data_tokenizer = read_tokenizer(data, read_meta(data))
        if data_tokenizer and data_tokenizer.name != tokenizer.name:
            raise UserError(f"--data {data} has tokenizer {data_tokenizer.name}, but the model has "
                            f"{tokenizer.name}: prepare the data with the model's tokenizer")
        shards = [stat_shard(path) for path in list_shards(data, "val")]
        return [read_tokens(shard, 0, shard.length, tokenizer.n_vocab) for shard in shards]
    text = TextConfig(input=[data], val_fraction=0)
    batches = read_batches(find_sources(text), text)
    return [np.concatenate([tokenizer.encode_documents(chunk[1:] for chunk in batch)
                            for batch in batches])]


if __name__ == "__main__":
    cli.run_cli(main, PerplexityConfig)
