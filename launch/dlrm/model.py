"""The deep learning recommendation model of Naumov et al. 2019 (arXiv 1906.00091)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class DLRMConfig:
    """The model's size.

    Attributes:
        numeric: numeric columns.
        cardinalities: values of each categorical column.
        embedding: width of what each column is mapped to.
        bottom, top: widths of the hidden layers below and above the interaction.
    """

    numeric: int
    cardinalities: tuple[int, ...]
    embedding: int = 32
    bottom: tuple[int, ...] = (256, 128)
    top: tuple[int, ...] = (512, 256)


class DLRM(nn.Module):
    """Embeddings of the categorical columns, an MLP of the numeric ones, their pairwise products, and an MLP on top."""

    def __init__(self, config: DLRMConfig) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(size, config.embedding) for size in config.cardinalities)
        self.bottom = _mlp([config.numeric, *config.bottom, config.embedding])
        vectors = len(config.cardinalities) + 1
        self.register_buffer("pairs", torch.tril_indices(vectors, vectors, offset=-1), persistent=False)
        self.top = _mlp([config.embedding + vectors * (vectors - 1) // 2, *config.top, 1])
        for table in self.embeddings:
            # The bound of the paper's own code: uniform in ±1/sqrt(rows).
            bound = table.num_embeddings**-0.5
            nn.init.uniform_(table.weight, -bound, bound)

    def scores(self, numeric: Tensor, categorical: Tensor) -> Tensor:
        """Logits, fp32 [n], of numeric columns [n, numeric] and categorical ones, int64 [n, columns]."""
        dense = F.relu(self.bottom(numeric))
        vectors = [dense, *(table(categorical[:, column]) for column, table in enumerate(self.embeddings))]
        stacked = torch.stack([vector.to(dense.dtype) for vector in vectors], dim=1)
        products = torch.bmm(stacked, stacked.mT)[:, self.pairs[0], self.pairs[1]]
        return self.top(torch.cat([dense, products], dim=1)).squeeze(1).float()

    def forward(self, numeric: Tensor, categorical: Tensor, labels: Tensor | None = None) -> Tensor:
        """The mean log loss, or the scores where there are no labels."""
        scores = self.scores(numeric, categorical)
        return scores if labels is None else F.binary_cross_entropy_with_logits(scores, labels)


def _mlp(widths: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])
