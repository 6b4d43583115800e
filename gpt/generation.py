"""Sampling text from a model."""

import codecs
from collections.abc import Iterator
from functools import partial

import tiktoken
import torch

from gpt.errors import UserError
from gpt.model import GPT


def complete(model: GPT, encoding: tiktoken.Encoding, prompts: list[str], max_new_tokens: int, *,
             temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> list[str]:
    """The prompts, each with its continuation: see `stream`."""
    pieces = stream(model, encoding, prompts, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                    seed=seed)
    return ["".join(text) for text in zip(*pieces, strict=True)]


def stream(model: GPT, encoding: tiktoken.Encoding, prompts: list[str], max_new_tokens: int, *,
           temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> Iterator[list[str]]:
    """Continue several prompts at once, up to `<|endoftext|>` (not shown) or by `max_new_tokens` tokens.

    Yields the prompts, and then after each token what it adds to each text: "" where it is a part of a character
    only, or the text has ended. temperature, top_k, top_p: see `sample`.
    Raises UserError for a prompt with tokens that the model does not know.
    """
    rows = [encoding.encode(prompt, allowed_special="all") for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if max(row) >= model.config.vocab_size:
            raise UserError(f"prompt {prompt!r} has token {max(row)}: the model knows {model.config.vocab_size} tokens")
    yield prompts
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in rows]
    silent = {encoding.eot_token, *range(encoding.n_vocab, model.config.vocab_size)}  # some models are padded
    for tokens in generate(model, rows, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
                           stop_token=encoding.eot_token):
        yield [decoder.decode(b"" if token is None or token in silent else encoding.decode_single_token_bytes(token))
               for decoder, token in zip(decoders, tokens, strict=True)]
    yield [decoder.decode(b"", final=True) for decoder in decoders]  # half of a character


@torch.no_grad()
def generate(model: GPT, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, seed: int = 0, stop_token: int | None = None,
             use_cache: bool = True) -> Iterator[list[int | None]]:
    """Continue several prompts at once; yields after each step the new token of every prompt.

    prompts: B lists of token ids, none of them empty, of any lengths. A prompt that has drawn `stop_token` is
    finished and yields None from there on; the iterator ends when all have, or after `max_new_tokens` steps.
    Beyond `block_size` tokens the model sees the last `block_size` of them. temperature, top_k, top_p: see
    `sample`. The draws depend on `seed` alone and leave PyTorch's global random state as it was. use_cache: keep the
    keys and values of earlier tokens (`KVCache`) instead of working them out anew for each token.

    Puts the model into evaluation mode while it runs.
    """
    rows = [list(prompt) for prompt in prompts]
    finished = [False] * len(rows)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws whatever the device
    was_training = model.training
    model.eval()
    length = max(map(len, rows)) + max_new_tokens - 1  # the last token is not read again
    cache = KVCache(model, len(rows), min(length, model.config.block_size)) if use_cache else None
    try:
        for _ in range(max_new_tokens):
            if max(map(len, rows)) > model.config.block_size:
                cache = None  # from here on every token moves to another position at every step
            tokens = sample(next_logits(model, rows, cache), temperature, top_k, top_p, generator)
            yield [None if done else token for token, done in zip(tokens, finished, strict=True)]
            finished = [done or token == stop_token for token, done in zip(tokens, finished, strict=True)]
            if all(finished):
                return
            for row, token in zip(rows, tokens, strict=True):
                row.append(token)
    finally:
        model.train(was_training)


class KVCache:
    """The keys and values of what a model has read of B texts, with room for `length` tokens of each.

    Shorter texts are padded on the right, where a causal model's earlier positions never look; a text's next token
    goes over the padding, which is out of sight until then.
    """

    def __init__(self, model: GPT, B: int, length: int):
        c = model.config
        self.kv = model.wte.weight.new_zeros(c.n_layer, 2, B, c.n_head, length, c.n_embd // c.n_head)
        self.lengths = [0] * B  # tokens of each text that are here
        self.new: tuple = ()  # where in (B, n_head, length) those belong that are being read

    def read(self, model: GPT, idx: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """The final activations of tokens `idx` (B, T): the texts so far, or then one more of each; (B, T, n_embd).

        At first `idx` may be (1, T), for B texts that begin alike. lengths: of the texts with these tokens.
        """
        before, self.lengths = self.lengths, lengths
        if min(before) == max(before):  # all at one place, as at the beginning
            new, mask = slice(before[0], before[0] + idx.shape[1]), None
            positions = torch.arange(new.start, new.stop, device=idx.device)[None]  # (1, T)
            self.new = (slice(None), slice(None), new)
        else:
            positions = torch.tensor(before, device=idx.device)[:, None]  # (B, 1)
            mask = (torch.arange(max(lengths), device=idx.device) <= positions)[:, None, None]  # (B, 1, 1, keys)
            self.new = (torch.arange(len(before), device=idx.device), slice(None), positions[:, 0])
        return model.hidden(idx, positions, mask, [partial(self.keep, kept) for kept in self.kv])

    def keep(self, kept: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put new keys and values (B or 1, n_head, T, head size) into a layer's part of the cache; all so far."""
        for there, new in zip(kept, (k, v), strict=True):
            there[self.new] = new if isinstance(self.new[0], slice) else new[:, :, 0]
        keys, values = kept[:, :len(k), :, :max(self.lengths)]
        return keys, values


def next_logits(model: GPT, rows: list[list[int]], cache: KVCache | None = None) -> torch.Tensor:
    """Logits (B, vocab_size), float32 on the CPU, for the token after each row of token ids.

    cache: has read the rows but for their last token, or nothing yet.
    """
    windows = ([row[read:] for row, read in zip(rows, cache.lengths, strict=True)] if cache else
               [row[-model.config.block_size:] for row in rows])
    if not (cache and any(cache.lengths)) and all(window == windows[0] for window in windows):
        windows = windows[:1]  # several samples of one prompt: it is read once for all
    longest = max(len(window) for window in windows)
    padded = [window + [0] * (longest - len(window)) for window in windows]
    idx = torch.tensor(padded, device=model.wte.weight.device)
    x = cache.read(model, idx, [len(row) for row in rows]) if cache else model.hidden(idx)  # (B, T, C)
    x = torch.stack([x[b, len(window) - 1] for b, window in enumerate(windows)])  # (B or 1, C), the last positions
    return model.lm_head(x).float().cpu().expand(len(rows), -1)


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
