"""A BERT encoder (Devlin et al. 2019, arXiv 1810.04805) with its masked language model's head; pre-norm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from transformer import Layer, initialise


@dataclass(frozen=True)
class BertConfig:
    """The model's size."""

    layers: int = 4
    d_model: int = 256
    heads: int = 4
    context: int = 128
    vocab: int = 4096


class Bert(nn.Module):
    """Says which tokens stood where some were masked; the output head is the embedding, transposed."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab, config.d_model)
        self.position_embedding = nn.Embedding(config.context, config.d_model)
        self.layers = nn.ModuleList(Layer(config.d_model, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.d_model)
        self.transform = nn.Linear(config.d_model, config.d_model)
        self.transform_norm = nn.LayerNorm(config.d_model)
        self.bias = nn.Parameter(torch.zeros(config.vocab))
        initialise(self)

    def forward(self, tokens: Tensor, places: Tensor, targets: Tensor, *, logits: bool = False) -> Tensor:
        """The mean cross-entropy over the masked places, an fp32 scalar; with `logits` those, [masked, vocab].

        Args:
            tokens: int64 [batch, context], some of them masked.
            places: int64 [masked], which of the batch's tokens, flattened, are asked for.
            targets: int64 [masked], what stood there.
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        for layer in self.layers:
            x = layer(x)
        asked = self.norm(x).flatten(0, 1)[places]
        hidden = self.transform_norm(F.gelu(self.transform(asked)))
        scores = F.linear(hidden, self.token_embedding.weight, self.bias).float()
        return scores if logits else F.cross_entropy(scores, targets)
