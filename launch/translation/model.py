"""An encoder-decoder transformer (Vaswani et al. 2017, arXiv 1706.03762), pre-norm, one embedding for everything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformer import CrossLayer, Layer, initialise
from translation.data import IGNORED, PAD, START, STOP


@dataclass(frozen=True)
class TranslatorConfig:
    """The model's size.

    Attributes:
        layers: of the encoder, and as many of the decoder.
        longest: tokens of the longest text.
        smoothing: of the labels in training (Vaswani et al., section 5.4).
    """

    layers: int = 3
    d_model: int = 256
    heads: int = 4
    longest: int = 48
    vocab: int = 2048
    smoothing: float = 0.1


class Translator(nn.Module):
    """Translates; the embedding is shared by both sides and by the output head."""

    def __init__(self, config: TranslatorConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab, config.d_model)
        self.source_positions = nn.Embedding(config.longest + 1, config.d_model)
        self.target_positions = nn.Embedding(config.longest + 1, config.d_model)
        self.encoder = nn.ModuleList(Layer(config.d_model, config.heads) for _ in range(config.layers))
        self.encoder_norm = nn.LayerNorm(config.d_model)
        self.decoder = nn.ModuleList(CrossLayer(config.d_model, config.heads) for _ in range(config.layers))
        self.decoder_norm = nn.LayerNorm(config.d_model)
        initialise(self)

    def forward(self, source: Tensor, given: Tensor, said: Tensor) -> Tensor:
        """Mean cross-entropy per token that counts, an fp32 scalar; with smoothed labels in training only.

        Args:
            source: int64 [n, sources], padded.
            given: int64 [n, targets], the translation after START.
            said: int64 [n, targets], the translation and STOP, padded by IGNORED.
        """
        logits = self.decode(*self.encode(source), given)
        smoothing = self.config.smoothing if self.training else 0.0
        return F.cross_entropy(logits.flatten(0, 1), said.flatten(), ignore_index=IGNORED, label_smoothing=smoothing)

    def encode(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """The memory [n, sources, d_model], and where a decoder may look at it: bool [n, 1, 1, sources]."""
        mask = (source != PAD)[:, None, None, :]
        # A text without tokens has its first padding to look at.
        mask[..., 0] = True
        x = self.token_embedding(source) + _positions(self.source_positions, source)
        for layer in self.encoder:
            x = layer(x, mask)
        return self.encoder_norm(x), mask

    def decode(self, memory: Tensor, mask: Tensor, given: Tensor) -> Tensor:
        """Logits of what follows each token, fp32 [n, targets, vocab]."""
        x = self.token_embedding(given) + _positions(self.target_positions, given)
        for layer in self.decoder:
            x = layer(x, memory, mask)
        return F.linear(self.decoder_norm(x), self.token_embedding.weight).float()

    @torch.no_grad()
    def translate(self, source: Tensor) -> Tensor:
        """The likeliest next token, again and again, until STOP: int64 [n, at most longest], PAD after the end."""
        memory, mask = self.encode(source)
        said = torch.full((len(source), 1), START, device=source.device)
        ended = torch.zeros(len(source), dtype=torch.bool, device=source.device)
        for _ in range(self.config.longest):
            token = self.decode(memory, mask, said)[:, -1].argmax(dim=1)
            ended |= token == STOP
            said = torch.cat([said, token.masked_fill(ended, PAD)[:, None]], dim=1)
            if bool(ended.all()):
                break
        return said[:, 1:]


def _positions(table: nn.Embedding, tokens: Tensor) -> Tensor:
    return table(torch.arange(tokens.shape[1], device=tokens.device))
