"""Click-through prediction, judged by the area under the ROC curve."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlrm.data import NUMERIC, Flights, Rows
from dlrm.model import DLRM, DLRMConfig
from metric import Metric
from sampling import Draw
from task import Batch, Task

# Rows in one forward pass of an evaluation.
EVAL_BATCH = 8192
# Bins of the scores' histograms: within one the ROC curve is taken for a straight line.
BINS = 1 << 14


class DLRMTask(Task):
    """Whether a flight arrives late."""

    metric = Metric("val_auc", "AUC", "higher")
    unit = "rows"
    units_per_sample = 1

    def __init__(self, flights: Flights) -> None:
        self._flights = flights
        self.config = DLRMConfig(len(NUMERIC), flights.cardinalities)
        self.training_size = len(flights.train)
        self.validation_size = -(-len(flights.validation) // EVAL_BATCH)

    def settings(self) -> dict[str, Any]:
        return {"data": {"training_rows": len(self._flights.train)}, "model": asdict(self.config)}

    def describe(self) -> str:
        train, validation = self._flights.train, self._flights.validation
        return f"{len(train):,} flights to train on, {len(validation):,} held out, {train.labels.mean():.1%} late"

    def model(self) -> nn.Module:
        return DLRM(self.config)

    def training_batch(self, samples: Draw) -> Batch:
        return _batch(self._flights.train, samples.places)

    def validation_batch(self, number: int) -> Batch:
        return _batch(self._flights.validation, slice(number * EVAL_BATCH, (number + 1) * EVAL_BATCH))

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        numeric, categorical, labels = batch
        scores = model(numeric, categorical)
        loss = F.binary_cross_entropy_with_logits(scores, labels, reduction="sum")
        positive, negative = (histogram(scores[labels == label]) for label in (1, 0))
        return torch.cat([loss.double().view(1), positive, negative])

    def summary(self, sums: Tensor) -> dict[str, float]:
        positive, negative = sums[1:].view(2, BINS)
        return {
            "val_auc": area_under_curve(positive, negative),
            "val_loss": float(sums[0] / (positive.sum() + negative.sum())),
        }


def histogram(scores: Tensor) -> Tensor:
    """How many scores fall into each bin of their probability, fp64 [BINS]."""
    bins = (scores.double().sigmoid() * BINS).long().clamp(max=BINS - 1)
    return torch.bincount(bins, minlength=BINS).double()


def area_under_curve(positive: Tensor, negative: Tensor) -> float:
    """The probability that a positive scores above a negative, ties counting half, from histograms of both."""
    below = negative.cumsum(0) - negative
    return float((positive * (below + 0.5 * negative)).sum() / (positive.sum() * negative.sum()))


def _batch(rows: Rows, chosen: Any) -> Batch:
    return tuple(torch.from_numpy(part[chosen]) for part in (rows.numeric, rows.categorical, rows.labels))
