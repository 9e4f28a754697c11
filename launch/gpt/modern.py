"""A decoder as of today: rotary positions, RMSNorm, normalised queries and keys, gated or squared-ReLU feed-forward."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.model import GPTConfig
from transformer import ResidualLayer, initialise

# The base of the rotations' wavelengths (Su et al. 2021, RoFormer, section 3.2.2).
ROTARY_BASE = 10_000.0
# torch's default is the smallest step of the dtype, which is large in bf16; this is T5's.
NORM_EPS = 1e-6
# A gated feed-forward half is a multiple of this wide.
HIDDEN_MULTIPLE = 128


def rotary_table(context: int, width: int) -> Tensor:
    """Cosines and sines of every position's rotations, fp32 [context, 1, width / 2, 2].

    Pair i of a head's `width` features turns by position * ROTARY_BASE^(-2 i / width), RoFormer's equation 15.
    """
    rates = ROTARY_BASE ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.outer(torch.arange(context, dtype=torch.float64), rates)
    return torch.stack((angles.cos(), angles.sin()), -1).float().unsqueeze(1)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turns neighbouring features of `x` [batch, context, heads, width] by the angles of `table`; fp32.

    A pair is a complex number here, since one product of those is faster than sums of real products.
    """
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(table.float())).flatten(-2)


class HeadNorm(nn.RMSNorm):
    """RMS norm of each head's features, in the dtype of its input."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast the weight is fp32 and `x` is not: torch warns of two dtypes and is slower.
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class RotaryAttention(nn.Module):
    """Causal self-attention with normalised, rotated queries and keys (Henry et al. 2020; Dehghani et al. 2023)."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, d_model, bias=False)
        self.value = nn.Linear(d_model, d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)
        self.query_norm = HeadNorm(d_model // heads)
        self.key_norm = HeadNorm(d_model // heads)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """From and to [batch, context, d_model]; `table` is `rotary_table` of this context."""
        query, key, value = (
            projection(x).unflatten(-1, (self.heads, -1)) for projection in (self.query, self.key, self.value)
        )
        query = rotate(self.query_norm(query), table).to(value.dtype)
        key = rotate(self.key_norm(key), table).to(value.dtype)
        mixed = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)), is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020), with about as many parameters as a plain half that is four times as wide inside."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        hidden = -(-8 * d_model // (3 * HIDDEN_MULTIPLE)) * HIDDEN_MULTIPLE
        self.gate = nn.Linear(d_model, hidden, bias=False)
        self.up = nn.Linear(d_model, hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class SquaredReluMLP(nn.Module):
    """Squared ReLU (So et al. 2021, Primer), four times as wide inside."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, 4 * d_model, bias=False)
        self.down = nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


class ModernLayer(ResidualLayer):
    """A pre-norm layer of the decoder."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        self.attention = RotaryAttention(config.d_model, config.heads)
        self.mlp_norm = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        self.mlp = (GatedMLP if config.mlp == "gated" else SquaredReluMLP)(config.d_model)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), table)
        return x + self.mlp(self.mlp_norm(x))

    def branch_ends(self) -> Iterable[nn.Linear]:
        return self.attention.out, self.mlp.down


class ModernGPT(nn.Module):
    """A decoder-only transformer with rotary positions and an untied output head, without biases."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab, config.d_model)
        self.layers = nn.ModuleList(ModernLayer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.d_model, eps=NORM_EPS)
        self.lm_head = nn.Linear(config.d_model, config.vocab, bias=False)
        self.register_buffer("rotary", rotary_table(config.context, config.head_width), persistent=False)
        initialise(self)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, an fp32 scalar; `tokens` and `targets` are int64 [batch, context]."""
        table = self.rotary[: tokens.shape[1]]
        x = self.token_embedding(tokens)
        for layer in self.layers:
            x = layer(x, table)
        logits = self.lm_head(self.norm(x))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
