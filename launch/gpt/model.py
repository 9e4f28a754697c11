"""The GPT-2-like model of pretrain_gpt.py, and the size and kind of either model that it trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformer import Layer, initialise

# "gpt2" is this file's GPT, "modern" is that of modern.py.
ARCHITECTURES = ("gpt2", "modern")
# The feed-forward halves that a modern GPT has a choice of.
MLPS = ("gated", "squared_relu")


@dataclass(frozen=True)
class GPTConfig:
    """The model's size and kind; the defaults make 3.3 million parameters. `build.build_gpt` makes the model.

    Attributes:
        architecture: one of ARCHITECTURES.
        mlp: one of MLPS, of the modern architecture only.

    Raises:
        ValueError: where a size is impossible or a kind unknown; the message names the field and what is allowed.
    """

    layers: int = 4
    d_model: int = 256
    heads: int = 4
    context: int = 256
    vocab: int = 256
    architecture: str = "gpt2"
    mlp: str = "gated"

    def __post_init__(self) -> None:
        for name in ("layers", "d_model", "heads", "context", "vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.d_model % self.heads:
            raise ValueError(f"d_model = {self.d_model}: must be divisible by heads = {self.heads}")
        for name, allowed in (("architecture", ARCHITECTURES), ("mlp", MLPS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} = {getattr(self, name)!r}: must be one of {', '.join(allowed)}")
        if self.architecture == "modern" and self.head_width % 2:
            raise ValueError(
                f"d_model = {self.d_model} with heads = {self.heads}: rotary positions turn pairs of features, "
                f"so d_model / heads must be even, not {self.head_width}"
            )

    @property
    def head_width(self) -> int:
        return self.d_model // self.heads


class GPT(nn.Module):
    """GPT-2's kind of decoder: LayerNorm, GELU, learned positions and an untied output head."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab, config.d_model)
        self.position_embedding = nn.Embedding(config.context, config.d_model)
        self.layers = nn.ModuleList(Layer(config.d_model, config.heads, causal=True) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.lm_head = nn.Linear(config.d_model, config.vocab, bias=False)
        initialise(self)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, an fp32 scalar; `tokens` and `targets` are int64 [batch, context]."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        for layer in self.layers:
            x = layer(x)
        logits = self.lm_head(self.norm(x))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
