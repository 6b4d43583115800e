"""Generate text with a model."""

import codecs
import platform
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch.nn.utils.rnn import pad_sequence

from gpt.config import GPTConfig
from gpt.errors import UserError
from gpt.model import GPT, evaluation_mode
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
    device, block_size = model.wte.weight.device, model.config.block_size
    rows = [list(prompt) for prompt in prompts]
    longest = max(map(len, rows))
    # Fewer shapes: on CUDA each new one costs a graph or a kernel plan.
    multiple = 128 if device.type == "cuda" else 1
    # Not under autocast: its copies of the weights are freed before a graph that reads them.
    use_graphs = device.type == "cuda" and not torch.is_autocast_enabled("cuda")
    length = min(longest + max_new_tokens - 1, block_size)  # the last token is never an input
    cache = KVCache(model.config, len(rows), round_up(length, multiple), device)
    needs_mask = multiple > 1 or min(map(len, rows)) < longest
    idx = torch.zeros(len(rows), 1, dtype=torch.int64, device=device)
    graphs: dict[int, Callable[[], torch.Tensor]] = {}
    finished = torch.zeros(len(rows), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the same samples on every device
    with evaluation_mode(model):
        for i in range(max_new_tokens):
            if i == 0 or longest > block_size:  # beyond block_size, all positions shift each time
                logits = prefill(model, cache, [row[-block_size:] for row in rows])
            else:
                n_keys = round_up(longest, multiple)
                step: Callable[[], torch.Tensor] = partial(
                    decode, model, cache, idx, n_keys, needs_mask)
                if use_graphs:
                    step = graphs[n_keys] = graphs.get(n_keys) or capture(step)
                logits = step()
                cache.positions += 1
            tokens = sample(logits, temperature, top_k, top_p, generator)  # (B,)
            tokens[finished] = stop_token
            yield tokens.tolist()
            finished = tokens == stop_token
            if finished.all():
                return
            idx.copy_(tokens[:, None])
            for row, token in zip(rows, tokens.tolist(), strict=True):
                row.append(token)
            longest += 1


def round_up(n: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least `n`."""
    return -(-n // multiple) * multiple


class KVCache:
    """Keys and values of B token sequences, up to `length` tokens each, so that the model need not
    run on earlier tokens again.

    Shorter sequences are padded on the right: causal attention never reads the padding from earlier
    positions, and the next token of a sequence overwrites it.
    """

    def __init__(self, config: GPTConfig, B: int, length: int, device: torch.device):
        # One tensor per layer, allocated when it first runs, in the dtype of the keys.
        self.layers: list[torch.Tensor] = []
        self.shape = (2, B, config.n_head, length, config.n_embd // config.n_head)
        self.rows = torch.arange(B, device=device)[:, None]  # (B, 1)
        self.positions = torch.zeros_like(self.rows)  # (B, T), of the tokens that the model runs on
        self.n_keys = 0  # how many keys they see

    def update(self, layer: int, kv: torch.Tensor) -> torch.Tensor:
        """Write keys and values `kv` (2, B, n_head, T, head size) of tokens at `positions` and
        return the first `n_keys` of the layer."""
        if layer == len(self.layers):
            self.layers.append(kv.new_zeros(self.shape))
        cache = self.layers[layer]
        cache[:, self.rows, :, self.positions] = kv.permute(1, 3, 0, 2, 4)  # (B, T, 2, n_head, D)
        return cache[:, :, :, :self.n_keys]


def prefill(model: GPT, cache: KVCache, rows: list[list[int]]) -> torch.Tensor:
    """Run the model on B rows of token ids; return the logits (B, vocab_size), float32, of the next
    tokens. Sets `cache.positions` to those of the next tokens."""
    device = cache.rows.device
    lengths = torch.tensor([len(row) for row in rows], device=device)
    padded = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)  # (B, T)
    cache.n_keys = padded.shape[1]
    cache.positions = torch.arange(cache.n_keys, device=device).expand(padded.shape)
    x = model.hidden_states(padded.to(device), kv_cache=cache)  # (B, T, C)
    cache.positions = lengths[:, None]
    return model.lm_head(x[cache.rows[:, 0], lengths - 1]).float()


def decode(model: GPT, cache: KVCache, idx: torch.Tensor, n_keys: int,
           needs_mask: bool) -> torch.Tensor:
    """Run the model on tokens `idx` (B, 1) at `cache.positions`; return the logits (B, vocab_size),
    float32, of the next tokens.

    needs_mask: whether some of the first `n_keys` keys are padding.
    """
    cache.n_keys = n_keys
    mask = None
    if needs_mask:
        keys = torch.arange(n_keys, device=idx.device)
        mask = (keys <= cache.positions[:, :, None])[:, None]  # (B, 1, 1, n_keys)
    x = model.hidden_states(idx, cache.positions, mask, cache)  # (B, 1, C)
    return model.lm_head(x[:, 0]).float()


def capture(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Return a function that replays the CUDA kernels of `step` as one CUDA graph.

    Launching hundreds of small kernels from Python takes several times as long as running them.
    Each replay reads the same memory and overwrites the previous result.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # what a first run allocates or loads must not be part of the graph
    with torch.cuda.graph(graph, stream=stream):  # waits for the first run
        result = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


def sample(logits: torch.Tensor, temperature: float, top_k: int, top_p: float,
           generator: torch.Generator) -> torch.Tensor:
    """Return one sampled token id for each row of `logits` (B, vocab_size): (B,) int64 on the CPU.

    temperature: divides the logits; 0 is greedy. top_k: keep the k most likely tokens (0: all).
    top_p: then keep the fewest tokens whose probabilities reach p
    (nucleus sampling, Holtzman et al. 2020).
    """
    if temperature == 0:
        return logits.argmax(dim=-1).cpu()
    vocab_size = logits.shape[-1]
    logits, token_ids = logits.topk(min(top_k or vocab_size, vocab_size))  # most likely first
    logits, token_ids = logits.cpu(), token_ids.cpu()  # (B, k)
    probs = ((logits - logits[:, :1]) / temperature).softmax(dim=-1)  # logits <= 0: cannot overflow
    if top_p < 1:
        cumulative_before = probs.cumsum(dim=-1) - probs  # of all more likely tokens
        probs[cumulative_before >= top_p] = 0  # the first is 0: the most likely token stays
    sampled = torch.multinomial(probs, 1, generator=generator)
    return token_ids.gather(1, sampled)[:, 0]
