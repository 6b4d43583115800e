"""Sampling text from a model."""

from collections.abc import Iterator

import tiktoken
import torch

from gpt.errors import UserError
from gpt.model import GPT


def complete(model: GPT, encoding: tiktoken.Encoding, prompts: list[str], max_new_tokens: int, *,
             temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> list[str]:
    """The prompts, each continued up to `<|endoftext|>` (not shown) or by `max_new_tokens` tokens, as text.

    Raises UserError for a prompt with tokens that the model does not know.
    """
    rows = [encoding.encode(prompt, allowed_special="all") for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if max(row) >= model.config.vocab_size:
            raise UserError(f"prompt {prompt!r} has token {max(row)}: the model knows {model.config.vocab_size} tokens")
    end = encoding.eot_token
    for tokens in generate(model, rows, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
                           stop_token=end):
        for row, token in zip(rows, tokens, strict=True):
            if token is not None and token != end and token < encoding.n_vocab:  # some vocabularies are padded
                row.append(token)
    return [encoding.decode(row) for row in rows]


@torch.no_grad()
def generate(model: GPT, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, seed: int = 0, stop_token: int | None = None) -> Iterator[list[int | None]]:
    """Continue several prompts at once; yields after each step the new token of every prompt.

    prompts: B lists of token ids, none of them empty, of any lengths. A prompt that has drawn `stop_token` is
    finished and yields None from there on; the iterator ends when all have, or after `max_new_tokens` steps.
    Beyond `block_size` tokens the model sees the last `block_size` of them. temperature, top_k, top_p: see
    `sample`. The draws depend on `seed` alone and leave PyTorch's global random state as it was.

    Puts the model into evaluation mode while it runs.
    """
    rows = [list(prompt) for prompt in prompts]
    finished = [False] * len(rows)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws whatever the device
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            tokens = sample(next_logits(model, rows), temperature, top_k, top_p, generator)
            for b, token in enumerate(tokens):
                if not finished[b]:
                    rows[b].append(token)
            yield [None if done else token for token, done in zip(tokens, finished, strict=True)]
            finished = [done or token == stop_token for token, done in zip(tokens, finished, strict=True)]
            if all(finished):
                return
    finally:
        model.train(was_training)


def next_logits(model: GPT, rows: list[list[int]]) -> torch.Tensor:
    """Logits (B, vocab_size), float32 on the CPU, for the token after each row of token ids."""
    windows = [row[-model.config.block_size:] for row in rows]
    longest = max(len(window) for window in windows)
    # Shorter rows are padded on the right, where a causal model's earlier positions never look.
    padded = [window + [0] * (longest - len(window)) for window in windows]
    x = model.hidden(torch.tensor(padded, device=model.wte.weight.device))  # (B, T, C)
    x = torch.stack([x[b, len(window) - 1] for b, window in enumerate(windows)])  # (B, C), each row's last position
    return model.lm_head(x).float().cpu()


def sample(logits: torch.Tensor, temperature: float, top_k: int, top_p: float,
           generator: torch.Generator) -> list[int]:
    """Draw one token for each row of `logits` (B, vocab_size).

    temperature: divides the logits; 0 takes the most likely token. top_k: keep the k most likely (0: all).
    top_p: then keep the fewest tokens whose probabilities reach p (nucleus sampling, Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(dim=-1).tolist()
    logits, order = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))  # (B, k), most likely first
    logits = (logits - logits[:, :1]) / temperature  # at most 0: no temperature is too small
    probs = logits.softmax(dim=-1)
    if top_p < 1:
        before = probs.cumsum(dim=-1) - probs  # probability of all that are more likely
        probs[:, 1:][before[:, 1:] >= top_p] = 0  # the most likely one always stays
    drawn = torch.multinomial(probs, 1, generator=generator)
    return order.gather(1, drawn)[:, 0].tolist()
