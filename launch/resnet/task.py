"""Classification of small images, judged by accuracy on the test set."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from command_line import integer_from
from metric import Metric
from resnet.data import LabelledImages, augmented, normalized
from resnet.model import ResNet, ResNetConfig
from sampling import Draw
from task import Batch, Task

# Images in one forward pass of an evaluation.
EVAL_BATCH = 500


class ResNetTask(Task):
    """What an image shows."""

    metric = Metric("val_accuracy", "accuracy", "higher")
    unit = "images"
    units_per_sample = 1

    def __init__(self, train: LabelledImages, test: LabelledImages, config: ResNetConfig) -> None:
        self._train, self._test, self.config = train, test, config
        self._mean, self._deviation = float(train.images.mean()), float(train.images.std())
        self.training_size = len(train)
        self.validation_size = -(-len(test) // EVAL_BATCH)

    def settings(self) -> dict[str, Any]:
        return {"data": {"training_images": len(self._train)}, "model": asdict(self.config)}

    def describe(self) -> str:
        return f"{len(self._train):,} images to train on, {len(self._test):,} to test"

    def model(self) -> nn.Module:
        return ResNet(self.config)

    def training_batch(self, samples: Draw) -> Batch:
        images = augmented(self._train.images[samples.places], samples.keys)
        return self._batch(images, self._train.labels[samples.places])

    def validation_batch(self, number: int) -> Batch:
        part = slice(number * EVAL_BATCH, (number + 1) * EVAL_BATCH)
        return self._batch(self._test.images[part], self._test.labels[part])

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        logits = model(images)
        loss = F.cross_entropy(logits, labels, reduction="sum").double()
        right = (logits.argmax(dim=1) == labels).sum().double()
        return torch.stack([loss, right, torch.full_like(right, len(labels))])

    def summary(self, sums: Tensor) -> dict[str, float]:
        return {"val_accuracy": float(sums[1] / sums[2]), "val_loss": float(sums[0] / sums[2])}

    def _batch(self, images: Any, labels: Any) -> Batch:
        return normalized(images, self._mean, self._deviation), torch.from_numpy(labels)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model's size."""
    size, positive = ResNetConfig(), integer_from(1)
    parser.add_argument(
        "--blocks", type=positive, default=size.blocks, help="residual blocks of a stage (default: %(default)s)"
    )
    parser.add_argument(
        "--width", type=positive, default=size.width, help="channels of the first stage (default: %(default)s)"
    )
