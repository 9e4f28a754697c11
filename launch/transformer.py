"""Layers of this folder's transformers: pre-norm, without biases, feed-forward halves four times as wide inside."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn import functional as F

# The standard deviation of GPT-2's initial weights (Radford et al. 2019, section 2.3).
INIT_STD = 0.02


class ResidualLayer(nn.Module, abc.ABC):
    """A layer that adds the outputs of its branches to its input; `initialise` asks it where they end."""

    @abc.abstractmethod
    def branch_ends(self) -> Iterable[nn.Linear]:
        """The matrices that write to the residual stream."""


class SelfAttention(nn.Module):
    """Multi-head self-attention with one fused projection for queries, keys and values."""

    def __init__(self, d_model: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[batch, context, d_model]; `mask` is true where a key may be looked at, [batch, 1, 1, context]."""
        batch, context, d_model = x.shape
        qkv = self.qkv(x).view(batch, context, 3, self.heads, d_model // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(batch, context, d_model))


class CrossAttention(nn.Module):
    """Multi-head attention from one sequence to another, with one fused projection for keys and values."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.kv = nn.Linear(d_model, 2 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """From `x` [batch, targets, d_model] to `memory` [batch, sources, d_model] where `mask` is true."""
        batch, targets, d_model = x.shape
        query = self.query(x).view(batch, targets, self.heads, -1).transpose(1, 2)
        kv = self.kv(memory).view(batch, memory.shape[1], 2, self.heads, -1)
        key, value = kv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(batch, targets, d_model))


class MLP(nn.Module):
    """The feed-forward half of a layer."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, 4 * d_model, bias=False)
        self.down = nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Layer(ResidualLayer):
    """A layer of an encoder, or with `causal` of a decoder that looks at nothing else."""

    def __init__(self, d_model: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = SelfAttention(d_model, heads, causal=causal)
        self.mlp_norm = nn.LayerNorm(d_model)
        self.mlp = MLP(d_model)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.mlp(self.mlp_norm(x))

    def branch_ends(self) -> Iterable[nn.Linear]:
        return self.attention.out, self.mlp.down


class CrossLayer(Layer):
    """A layer of a decoder that looks at an encoder's output too."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__(d_model, heads, causal=True)
        self.cross_norm = nn.LayerNorm(d_model)
        self.cross = CrossAttention(d_model, heads)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        x = x + self.attention(self.attention_norm(x))
        x = x + self.cross(self.cross_norm(x), memory, mask)
        return x + self.mlp(self.mlp_norm(x))

    def branch_ends(self) -> Iterable[nn.Linear]:
        return *super().branch_ends(), self.cross.out


def initialise(model: nn.Module) -> None:
    """Normal weights; those that write to the residual stream smaller, so that its variance doesn't grow with depth."""
    model.apply(_initialise)
    layers = [module for module in model.modules() if isinstance(module, ResidualLayer)]
    ends = [end for layer in layers for end in layer.branch_ends()]
    for end in ends:
        nn.init.normal_(end.weight, std=INIT_STD / math.sqrt(len(ends)))


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
