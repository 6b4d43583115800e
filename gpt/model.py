"""GPT-2 (Radford et al. 2019): the original GPT's decoder with the layer norms moved
to the front of each block.

State-dict names are GPT-2's own (wte, wpe, h.N.ln_1, h.N.attn.c_attn, …, ln_f) and every weight
is stored as `nn.Linear` has it, (out, in), as in nanoGPT; Hugging Face's files hold the four
matrices of a block transposed.
The LM head is tied to the token embedding and has no separate entry.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from gpt.config import GPTConfig
from gpt.errors import UserError
from gpt.loss import linear_cross_entropy


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None,
              dropout_p: float = 0.0) -> torch.Tensor:
    """Return the attention of queries `q` (B, n_head, T, D) to keys and values
    (B, n_head, T_k, D); shaped as `q`.

    mask: true where a query sees a key. Without a mask, attention is causal,
    and a single query sees all keys.

    Under autocast on a CPU, PyTorch's fused kernel is slow in bfloat16. There, short sequences use
    unfused attention, as long as the (T, T) scores take no more memory than float32 copies of q, k,
    v and the result would; longer ones use the fused kernel in float32.
    """
    B, n_head, T, D = q.shape
    is_causal = mask is None
    # Not `mask is None and T > 1`: under torch.compile that can be a SymBool, not a bool.
    if T == 1:
        is_causal = False
    if not (q.device.type == "cpu" and torch.is_autocast_enabled("cpu")):
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)
    if is_causal and T <= 8 * D:
        q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)  # (B * n_head, T, D)
        causal_bias = q.new_full((T, T), -math.inf).triu(1).expand(len(q), T, T)
        scale = 1 / math.sqrt(D)
        p = torch.baddbmm(causal_bias, q, k.mT, alpha=scale).softmax(2)  # (B * n_head, T, T)
        return (F.dropout(p, dropout_p) @ v).view(B, n_head, T, D)
    with torch.autocast("cpu", enabled=False):
        q, k, v = q.float(), k.float(), v.float()
        return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which each position sees itself and earlier positions."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        # Query, key and value in one matmul.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, kv_cache: Any = None,
                layer: int = 0) -> torch.Tensor:
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        qkv = qkv.permute(2, 0, 3, 1, 4)
        q, k, v = qkv  # each (B, n_head, T, D)
        if kv_cache is not None:
            k, v = kv_cache.update(layer, qkv[1:])  # now with earlier tokens
        y = attention(q, k, v, mask, self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)  # concatenate the heads
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers with a hidden size of 4 * n_embd and GPT-2's tanh approximation of GELU."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4 * C)
        return self.resid_dropout(self.c_proj(x))  # (B, T, C)


class Block(nn.Module):
    """Transformer block with pre-norm: attention and MLP each read a normalized copy
    of the residual stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, kv_cache: Any = None,
                layer: int = 0) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x), mask, kv_cache, layer)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch off dropout inside the `with` statement."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class SkipInit(TorchFunctionMode):
    """Disable `torch.nn.init`: on meta tensors, its normal_ would first import 900 modules of
    PyTorch's compiler, which takes 1.5 s and 150 MB."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (),
                           kwargs: dict | None = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return None
        return func(*args, **(kwargs or {}))


class GPT(nn.Module):
    """The language model.

    `model(idx)` returns logits (B, T, vocab_size). `model(idx, targets)` returns only the mean
    cross-entropy, in nats per token: with 50,257 tokens, logits would be the largest tensor by far,
    and gpt/loss.py does not keep them.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.apply(self._init_weights)
        # The residual stream sums 2 * n_layer projections: scale them so that its variance does not
        # grow with depth (Radford et al. 2019, section 2.3).
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer))

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    @classmethod
    def from_checkpoint(cls, checkpoint: dict, **overrides: Any) -> "GPT":
        """Return the model of a checkpoint, with a copy of its weights: each one is taken out of
        `checkpoint["model"]`, so that memory holds them only once.

        `overrides` change its config: dropout, or a smaller block_size, which drops the later
        positions. Raises UserError if the config and the weights do not match.
        """
        weights = checkpoint["model"]
        if "block_size" in overrides:
            weights["wpe.weight"] = weights["wpe.weight"][:overrides["block_size"]]
        config = {**checkpoint["config"], **overrides}
        model = cls.on_meta_device({"config": config, "model": weights})
        copies = {}
        for name, parameter in model.named_parameters():
            copies[name] = torch.empty(parameter.shape).copy_(weights.pop(name))
        model.load_state_dict(copies, assign=True)
        return model

    @classmethod
    def on_meta_device(cls, checkpoint: dict) -> "GPT":
        """Return the model of a checkpoint without weights. Raises UserError if the config is
        invalid or the checkpoint's weights do not match it."""
        weights = checkpoint["model"]
        try:
            config = GPTConfig(**checkpoint["config"])
            n_layer = len({name.split(".")[1] for name in weights if name.startswith("h.")})
            if n_layer != config.n_layer:  # checked first: a wrong n_layer can be huge
                raise ValueError(f"n_layer is {config.n_layer}, the weights have {n_layer} layers")
            with torch.device("meta"), SkipInit():
                model = cls(config)
            expected = {name: weight.shape for name, weight in model.state_dict().items()}
            found = {name: weight.shape for name, weight in weights.items()
                     if weight.layout == torch.strided and weight.is_floating_point()}
            for name in {**expected, **found}:
                if found.get(name) != expected.get(name):
                    raise ValueError(f"{name} is {found.get(name)}, expected {expected.get(name)}")
        except Exception as error:  # arbitrary values can raise anything
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"invalid config or weights ({reason})") from None
        return model

    @classmethod
    def from_pretrained(cls, name_or_path: str, **overrides: Any) -> "GPT":
        """Return a model with GPT-2 weights in Hugging Face's format,
        see `gpt.pretrained.load_pretrained`.

        name_or_path: "gpt2", "gpt2-xl", another name on the hub, or a local folder. In evaluation
        mode, without dropout; `overrides`: see `from_checkpoint`. Raises `gpt.errors.UserError` if
        the weights cannot be downloaded, are damaged, or belong to an unsupported model.
        """
        from gpt import pretrained  # imported here: nothing else in this module needs file formats

        return cls.from_checkpoint(pretrained.load_pretrained(name_or_path), **overrides).eval()

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Return logits (B, T, vocab_size) for token ids `idx` (B, T) or, with `targets` (B, T),
        the loss, a scalar."""
        x = self.hidden_states(idx)
        if targets is None:
            return self.lm_head(x)
        return linear_cross_entropy(x.flatten(0, 1), self.wte.weight, targets.flatten())

    def hidden_states(self, idx: torch.Tensor, positions: torch.Tensor | None = None,
                      mask: torch.Tensor | None = None, kv_cache: Any = None) -> torch.Tensor:
        """Return the final hidden states (B, T, n_embd) for token ids `idx` (B, T).

        positions (B, T): position of each token, below block_size; default: 0 to T - 1.
        mask (B, 1, T, n_keys): true where a query (third dimension) sees a key; default: causal.
        kv_cache: a `gpt.generation.KVCache`, which adds the keys and values of earlier tokens.
        Raises ValueError for more positions than block_size.
        """
        T = idx.shape[1]
        if positions is None and self.config.block_size < T:
            raise ValueError(f"{T} tokens exceed block_size {self.config.block_size}: "
                             f"truncate the input")
        x = self.wpe.weight[:T] if positions is None else self.wpe(positions)
        x = self.drop(self.wte(idx) + x)  # (B, T, C)
        for i, block in enumerate(self.h):
            x = block(x, mask, kv_cache, i)
        return self.ln_f(x)

    def lm_head(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (…, vocab_size) for hidden states `x` (…, n_embd),
        using the tied token embedding."""
        return F.linear(x, self.wte.weight)

    def num_parameters(self) -> int:
        """Return the number of parameters, with the tied token embedding counted once:
        124,439,808 for GPT-2 124M."""
        return sum(parameter.numel() for parameter in self.parameters())
