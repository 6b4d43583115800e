"""Generate text with a model."""

import codecs
import platform
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn as nn

from gpt.errors import UserError
from gpt.model import GPT
from gpt.tokenizer import Tokenizer

# Private ops, because the public torch.utils.mkldnn reads packed weights no faster than F.linear reads plain ones.
CAN_PACK = (torch.backends.mkldnn.is_available() and platform.machine().lower() in ("x86_64", "amd64")
            and hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise"))


def prepare_for_generation(model: GPT, dtype: torch.dtype) -> None:
    """Convert `model` to `dtype` in place and, on an x86 CPU, pack its weights into oneDNN's layout.

    Call it once: a packed model can only run forward; its weights cannot be trained, saved or converted again. The LM
    head is packed as a copy of `wte`, whose plain layout the embedding lookup needs.
    """
    model.to(dtype)
    if not CAN_PACK or model.wte.weight.device.type != "cpu" or not (
            dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            # Queries, keys and values in float32: in bfloat16 PyTorch's fused CPU attention is 2 to 8 times slower.
            out_dtype = torch.float32 if name.endswith("c_attn") else dtype
            module.forward = packed_linear(module.weight, module.bias, out_dtype)  # type: ignore[method-assign]
            module.weight = None  # type: ignore[assignment]  # free each plain weight before packing the next one
    model.lm_head = packed_linear(model.wte.weight, None, dtype)  # type: ignore[method-assign]


@torch.no_grad()
def packed_linear(weight: torch.Tensor, bias: torch.Tensor | None,
                  out_dtype: torch.dtype) -> Callable[..., torch.Tensor]:
    """Return F.linear for inputs (..., in) with a packed copy of `weight` (out, in); its result is cast."""
    packed, linear = torch.ops.mkldnn._reorder_linear_weight(weight), torch.ops.mkldnn._linear_pointwise
    return lambda x: linear(x.to(packed.dtype), packed, bias, "none", [], "").to(out_dtype)


def generate_text(model: GPT, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: int, *,
                  temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> list[str]:
    """Return each prompt with its continuation, see `stream_text`."""
    pieces = stream_text(model, tokenizer, prompts, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
                         seed=seed)
    return ["".join(text) for text in zip(*pieces, strict=True)]


def stream_text(model: GPT, tokenizer: Tokenizer, prompts: list[str], max_new_tokens: int, *,
                temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> Iterator[list[str]]:
    """Yield the prompts, then after each token the new text of each sample.

    A sample ends at `<|endoftext|>` (not shown) or after `max_new_tokens` tokens. Its new text is "" after its end and
    while a character is incomplete. temperature, top_k, top_p: see `sample`.
    Raises UserError for a prompt with token ids beyond the model's vocabulary.
    """
    rows = [tokenizer.encode(prompt, allow_special=True) for prompt in prompts]
    for prompt, row in zip(prompts, rows, strict=True):
        if max(row) >= model.config.vocab_size:
            raise UserError(f"prompt {prompt!r} has token {max(row)}: the model knows {model.config.vocab_size} tokens")
    yield prompts
    decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in rows]
    non_text_tokens = {tokenizer.end_of_text, *range(tokenizer.n_vocab, model.config.vocab_size)}  # padded vocabularies
    for tokens in generate(model, rows, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
                           stop_token=tokenizer.end_of_text):
        yield [decoder.decode(b"" if token is None or token in non_text_tokens else
                              tokenizer.encoding.decode_single_token_bytes(token))
               for decoder, token in zip(decoders, tokens, strict=True)]
    yield [decoder.decode(b"", final=True) for decoder in decoders]  # an incomplete last character


@torch.no_grad()
def generate(model: GPT, prompts: list[list[int]], max_new_tokens: int, *, temperature: float = 1.0, top_k: int = 0,
             top_p: float = 1.0, seed: int = 0, stop_token: int | None = None,
             use_cache: bool = True) -> Iterator[list[int | None]]:
    """Yield the next token id of every prompt, `max_new_tokens` times.

    prompts: B non-empty lists of token ids, of any lengths. After `stop_token` a prompt yields None; when all prompts
    have reached it, the iterator ends. Beyond `block_size` tokens the model sees only the last `block_size`.
    temperature, top_k, top_p: see `sample`. Sampling depends on `seed` only and leaves PyTorch's global random state
    unchanged. use_cache: keep keys and values of earlier tokens (`KVCache`) instead of recomputing them for each token.

    The model is in evaluation mode during each call and back in its previous mode at the end.
    """
    rows = [list(prompt) for prompt in prompts]
    finished = [False] * len(rows)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same samples on every device
    was_training = model.training
    model.eval()
    length = max(map(len, rows)) + max_new_tokens - 1  # the last token is never an input
    cache = KVCache(model, len(rows), min(length, model.config.block_size)) if use_cache else None
    try:
        for _ in range(max_new_tokens):
            if max(map(len, rows)) > model.config.block_size:
                cache = None  # from here on the position of every token changes at every step
            tokens = sample(next_token_logits(model, rows, cache), temperature, top_k, top_p, generator)
            yield [None if done else token for token, done in zip(tokens, finished, strict=True)]
            finished = [done or token == stop_token for token, done in zip(tokens, finished, strict=True)]
            if all(finished):
                return
            for row, token in zip(rows, tokens, strict=True):
                row.append(token)
    finally:
        model.train(was_training)


class KVCache:
    """Keys and values of B token sequences, up to `length` tokens each.

    Shorter sequences are padded on the right, which causal attention never reads from earlier positions; the next
    token of a sequence overwrites its padding.
    """

    def __init__(self, model: GPT, B: int, length: int):
        c = model.config
        self.kv: list[torch.Tensor] = []  # of each layer, allocated in the keys' dtype when it first runs
        self.kv_shape = (2, B, c.n_head, length, c.n_embd // c.n_head)
        self.lengths = [0] * B  # cached tokens of each sequence
        self.write_index: tuple = ()  # of the current tokens, in (B, n_head, length)

    def forward(self, model: GPT, idx: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """Return the final hidden states (B, T, n_embd) for tokens `idx` (B, T): first the prompts, then T = 1.

        For B equal prompts the first `idx` may be (1, T). lengths: of the sequences including these tokens.
        """
        cached, self.lengths = self.lengths, lengths
        if min(cached) == max(cached):  # equal lengths, as at the beginning
            new, mask = slice(cached[0], cached[0] + idx.shape[1]), None
            positions = torch.arange(new.start, new.stop, device=idx.device)[None]  # (1, T)
            self.write_index = (slice(None), slice(None), new)
        else:
            positions = torch.tensor(cached, device=idx.device)[:, None]  # (B, 1)
            mask = (torch.arange(max(lengths), device=idx.device) <= positions)[:, None, None]  # (B, 1, 1, keys)
            self.write_index = (torch.arange(len(cached), device=idx.device), slice(None), positions[:, 0])
        return model.hidden_states(idx, positions, mask, [partial(self.update, i) for i in range(len(model.h))])

    def update(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values (B or 1, n_head, T, head size) to a layer's cache, return all of them so far."""
        if layer == len(self.kv):
            self.kv.append(k.new_zeros(self.kv_shape))
        layer_kv = self.kv[layer]
        for cache, new in zip(layer_kv, (k, v), strict=True):
            cache[self.write_index] = new if isinstance(self.write_index[0], slice) else new[:, :, 0]
        keys, values = layer_kv[:, :len(k), :, :max(self.lengths)]
        return keys, values


def next_token_logits(model: GPT, rows: list[list[int]], cache: KVCache | None = None) -> torch.Tensor:
    """Return the logits (B, vocab_size), float32 on the CPU, for the token after each row of token ids.

    cache: empty, or with all tokens of the rows except the last ones.
    """
    inputs = ([row[cached:] for row, cached in zip(rows, cache.lengths, strict=True)] if cache else
              [row[-model.config.block_size:] for row in rows])
    if not (cache and any(cache.lengths)) and all(row == inputs[0] for row in inputs):
        inputs = inputs[:1]  # several samples of one prompt: a single forward pass
    longest = max(map(len, inputs))
    padded = [row + [0] * (longest - len(row)) for row in inputs]
    idx = torch.tensor(padded, device=model.wte.weight.device)
    x = cache.forward(model, idx, [len(row) for row in rows]) if cache else model.hidden_states(idx)  # (B, T, C)
    x = torch.stack([x[b, len(row) - 1] for b, row in enumerate(inputs)])  # (B or 1, C), the last positions
    return model.lm_head(x).float().cpu().expand(len(rows), -1)


def sample(logits: torch.Tensor, temperature: float, top_k: int, top_p: float,
           generator: torch.Generator) -> list[int]:
    """Return one sampled token id for each row of `logits` (B, vocab_size).

    temperature: divides the logits; 0 is greedy. top_k: keep the k most likely tokens (0: all).
    top_p: then keep the fewest tokens whose probabilities reach p (nucleus sampling, Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(dim=-1).tolist()
    logits, token_ids = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]))  # (B, k), most likely first
    logits = (logits - logits[:, :1]) / temperature  # at most 0: no temperature is too small
    probs = logits.softmax(dim=-1)
    if top_p < 1:
        cumulative_before = probs.cumsum(dim=-1) - probs  # of all more likely tokens
        probs[:, 1:][cumulative_before[:, 1:] >= top_p] = 0  # the most likely token always stays
    sampled = torch.multinomial(probs, 1, generator=generator)
    return token_ids.gather(1, sampled)[:, 0].tolist()
