"""What a training program brings to the loop that all of them share: a model, batches, and how it is judged."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from metric import Metric
from sampling import Draw

Batch = tuple[Tensor, ...]


class Task(abc.ABC):
    """One kind of training.

    Attributes:
        metric: what validation is judged by; `summary` has it under its key.
        unit: what throughput is counted in, "tokens" or "images", say.
        units_per_sample: how many of them a sample has.
        training_size: samples to train on.
        validation_size: batches to validate on.
    """

    metric: Metric
    unit: str
    units_per_sample: int
    training_size: int
    validation_size: int

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """What a resumed run must have in common: `data` and `model`."""

    @abc.abstractmethod
    def describe(self) -> str:
        """The data in one line."""

    @abc.abstractmethod
    def model(self) -> nn.Module:
        """A new model whose forward takes a training batch and gives the loss, an fp32 scalar."""

    @abc.abstractmethod
    def training_batch(self, samples: Draw) -> Batch:
        """These samples of the training set."""

    def training_record(self, loss: float) -> dict[str, float]:
        """What the record of a step says of the model's mean loss; under "loss" in the unit of validation's."""
        return {"loss": loss}

    @abc.abstractmethod
    def validation_batch(self, number: int) -> Batch:
        """One of the `validation_size` batches, the same for every run."""

    @abc.abstractmethod
    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        """What a validation batch adds to the sums that `summary` reads: fp64 [k]. Called without gradients."""

    @abc.abstractmethod
    def summary(self, sums: Tensor) -> dict[str, float]:
        """The metrics of the whole validation set from the sums over its batches, fp64 [k]."""

    def final(self, model: nn.Module) -> Mapping[str, float]:
        """Further metrics of a finished run, on rank 0 alone; `model` is the whole one. None unless overridden."""
        return {}
