"""The config of a GPT-2 model."""

from dataclasses import dataclass

from gpt.errors import UserError


@dataclass
class GPTConfig:
    """Model config; the defaults are GPT-2 124M. Raises UserError for invalid values."""

    block_size: int = 1024  # context length in tokens
    vocab_size: int = 50257  # vocabulary size
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads per block; must divide n_embd
    n_embd: int = 768  # embedding (hidden) dimension
    dropout: float = 0.0  # dropout probability

    def __post_init__(self) -> None:
        for name in ("n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: must be at least 1")
        for name in ("block_size", "vocab_size"):  # 0: from a run's seq_len and data
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: must not be negative")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: "
                            f"change one of them (the head size is n_embd / n_head)")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}: must be at least 0 and below 1")


# The four released sizes (Radford et al. 2019, table 2): GPTConfig(**GPT2_CONFIGS["gpt2-medium"]).
GPT2_CONFIGS = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),  # 124M parameters
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),  # 355M
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),  # 774M
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),  # 1.56B
}
