"""A plain byte-level GPT: the model that pretrain_gpt.py trains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformer import Layer, initialise


@dataclass(frozen=True)
class GPTConfig:
    """The model's size; the defaults make 3.3 million parameters."""

    layers: int = 4
    d_model: int = 256
    heads: int = 4
    context: int = 256
    vocab: int = 256

    def __post_init__(self) -> None:
        for name in ("layers", "d_model", "heads", "context", "vocab"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: must be at least 1")
        if self.d_model % self.heads:
            raise ValueError(f"d_model = {self.d_model}: must be divisible by heads = {self.heads}")


class GPT(nn.Module):
    """A decoder-only transformer over bytes, with learned positions and an untied output head."""

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
