"""Generate text with a model."""

import codecs
import platform
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn as nn

from gpt.errors import UserError
from gpt.model import GPT
from gpt.tokenizer import Tokenizer

# Private ops: with the public torch.utils.mkldnn,
# packed weights are no faster than plain ones in F.linear.
CAN_PACK = (torch.backends.mkldnn.is_available()
            and platform.machine().lower() in ("x86_64", "amd64")
            and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
            and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


def prepare_for_inference(model: GPT, dtype: torch.dtype) -> None:
    """Convert `model` to `dtype` in place and, on an x86 CPU,
    pack its weights into oneDNN's layout.

    Call it once: a packed model can only run forward; its weights cannot be trained,
    saved or converted again. The LM head is packed as a copy of `wte`, whose plain layout
    the embedding lookup needs.
    """
    model.to(dtype)
    if not CAN_PACK or model.wte.weight.device.type != "cpu":
        return
    can_pack_dtype = dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if not can_pack_dtype:
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            # Queries, keys and values in float32: in bfloat16 PyTorch's fused CPU attention
            # is 2 to 8 times slower.
            out_dtype = torch.float32 if name.endswith("c_attn") else dtype
            forward = packed_linear(module.weight, module.bias, out_dtype)
            module.forward = forward  # type: ignore[method-assign]
            # Free each plain weight before packing the next one.
            module.weight = None  # type: ignore[assignment]
    model.lm_head = packed_linear(model.wte.weight, None, dtype)  # type: ignore[method-assign]


@torch.no_grad()
def packed_linear(weight: torch.Tensor, bias: torch.Tensor | None,
                  out_dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """Return F.linear for inputs (..., in) with a packed copy of `weight` (out, in) and results
    in `out_dtype`."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    linear = torch.ops.mkldnn._linear_pointwise
    return lambda x: linear(x.to(packed.dtype), packed, bias, "none", [], "").to(out_dtype)


def generate_text(model: GPT, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: int,
                  **sampling: Any) -> list[str]:
    """Return each prompt with its continuation, see `stream_text`."""
    pieces = stream_text(model, tokenizer, prompts, max_new_tokens, **sampling)
    return ["".join(text) for text in zip(*pieces, strict=True)]


def stream_text(model: GPT, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: int,
                **sampling: Any) -> Iterator[list[str]]:
    """Yield the prompts, then after each token the new text of each sample.

    A sample ends at `<|endoftext|>` (not shown) or after `max_new_tokens` tokens. Its new text
    is "" after its end and while a character is incomplete. sampling: temperature, top_k,
    top_p and seed, see `generate`.
    Raises UserError for a prompt with token ids beyond the model's vocabulary.
    """
    rows = [tokenizer.encode(prompt, allow_special=True) or [tokenizer.end_of_text]
            for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if max(row) >= model.config.vocab_size:
            raise UserError(f"prompt {prompt!r} has token id {max(row)}, but the model's "
                            f"vocabulary has {model.config.vocab_size} tokens: pass another prompt")
    yield prompts
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in rows]
    decode_token = tokenizer.encoding.decode_single_token_bytes
    end_of_text = tokenizer.end_of_text
    for tokens in generate(model, rows, max_new_tokens, stop_token=end_of_text, **sampling):
        # <|endoftext|> is the tokenizer's last token;
        # ids beyond it are the padding of some models' vocabularies.
        pieces = [decode_token(token) if token < end_of_text else b"" for token in tokens]
        yield [decoder.decode(piece) for decoder, piece in zip(decoders, pieces, strict=True)]
    yield [decoder.decode(b"", final=True) for decoder in decoders]  # an incomplete last character


@torch.no_grad()
def generate(model: GPT, prompts: list[list[int]], max_new_tokens: int, *,
             temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
             stop_token: int = -1) -> Iterator[list[int]]:
    """Yield the next token id of every prompt, `max_new_tokens` times.

    prompts: B non-empty lists of token ids, of any lengths. A prompt that has reached
    `stop_token` repeats it; when all have, the iterator ends. Beyond `block_size` tokens the
    model sees only the last `block_size`.
    temperature, top_k, top_p: see `sample`. Sampling depends on `seed` only and leaves PyTorch's
    global random state unchanged. The model is in evaluation mode until the iterator ends, then
    back in its previous mode.
    """
    block_size = model.config.block_size
    rows, finished = [list(prompt) for prompt in prompts], [False] * len(prompts)
    length = max(map(len, rows)) + max_new_tokens - 1  # the last token is never an input
    cache = KVCache(model, len(rows), min(length, block_size))
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same samples on every device
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            if max(map(len, rows)) > block_size:  # all positions shift, which invalidates the cache
                rows, cache.lengths = [row[-block_size:] for row in rows], [0] * len(rows)
            tokens = sample(cache.next_token_logits(rows), temperature, top_k, top_p, generator)
            tokens = [stop_token if done else token
                      for token, done in zip(tokens, finished, strict=True)]
            yield tokens
            finished = [token == stop_token for token in tokens]
            if all(finished):
                return
            for row, token in zip(rows, tokens, strict=True):
                row.append(token)
    finally:
        model.train(was_training)


class KVCache:
    """Keys and values of B token sequences, up to `length` tokens each,
    so that the model runs on every token once.

    Shorter sequences are padded on the right, which causal attention never reads from earlier
    positions; the next token of a sequence overwrites its padding.
    """

    def __init__(self, model: GPT, B: int, length: int):
        c, self.model = model.config, model
        # Of each layer, allocated in the keys' dtype when it first runs.
        self.kv: list[torch.Tensor] = []
        self.kv_shape = (2, B, c.n_head, length, c.n_embd // c.n_head)
        self.lengths = [0] * B  # cached tokens of each sequence

    def next_token_logits(self, rows: list[list[int]]) -> torch.Tensor:
        """Return the logits (B, vocab_size), float32 on the CPU, for the token after each
        of B rows of token ids.

        An empty cache takes rows of any lengths;
        later calls take the same rows with one more token each.
        """
        device = self.model.wte.weight.device
        cached, self.lengths = self.lengths, [len(row) for row in rows]
        inputs = [row[n:] for row, n in zip(rows, cached, strict=True)]
        T = max(map(len, inputs))
        padded = [tokens + [0] * (T - len(tokens)) for tokens in inputs]
        idx = torch.tensor(padded, device=device)  # (B, T)
        begins = torch.tensor(cached, device=device)[:, None]
        positions = begins + torch.arange(T, device=device)  # (B, T)
        self.write_index = (torch.arange(len(rows), device=device)[:, None], slice(None), positions)
        mask = None
        if min(cached) < max(cached):  # hide the padding of shorter rows
            keys = torch.arange(max(self.lengths), device=device)
            mask = (keys <= positions[..., None])[:, None]  # (B, 1, T, keys)
        x = self.model.hidden_states(  # (B, T, C)
            idx, positions, mask, [partial(self.update, i) for i in range(len(self.model.h))])
        # The last positions, (B, C).
        x = torch.stack([x[b, len(tokens) - 1] for b, tokens in enumerate(inputs)])
        return self.model.lm_head(x).float().cpu()

    def update(self, layer: int, k: torch.Tensor,
               v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values (B, n_head, T, head size) to a layer's cache
        and return all so far."""
        if layer == len(self.kv):
            self.kv.append(k.new_zeros(self.kv_shape))
        for cache, new in zip(self.kv[layer], (k, v), strict=True):
            cache[self.write_index] = new.transpose(1, 2)
        keys, values = self.kv[layer][..., :max(self.lengths), :]
        return keys, values


def sample(logits: torch.Tensor, temperature: float, top_k: int, top_p: float,
           generator: torch.Generator) -> list[int]:
    """Return one sampled token id for each row of `logits` (B, vocab_size).

    temperature: divides the logits; 0 is greedy. top_k: keep the k most likely tokens (0: all).
    top_p: then keep the fewest tokens whose probabilities reach p
    (nucleus sampling, Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(dim=-1).tolist()
    vocab_size = logits.shape[-1]
    k = min(top_k or vocab_size, vocab_size)
    logits, token_ids = logits.topk(k)  # (B, k), most likely first
    probs = ((logits - logits[:, :1]) / temperature).softmax(dim=-1)  # logits <= 0: cannot overflow
    if top_p < 1:
        cumulative_before = probs.cumsum(dim=-1) - probs  # of all more likely tokens
        probs[cumulative_before >= top_p] = 0  # the first is 0: the most likely token stays
    sampled = torch.multinomial(probs, 1, generator=generator)
    return token_ids.gather(1, sampled)[:, 0].tolist()
