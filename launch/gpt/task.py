"""Pretraining of the byte GPT, judged by its loss on held-out text."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from command_line import integer_from
from gpt.data import Corpus, cut_windows
from gpt.model import GPT, GPTConfig
from metric import Metric
from sampling import Draw
from task import Batch, Task

# Windows in one forward pass of an evaluation.
EVAL_BATCH = 8


class GPTTask(Task):
    """The next byte of a text."""

    metric = Metric("val_loss", "loss (nats per byte)", "lower")
    unit = "tokens"

    def __init__(self, corpus: Corpus, config: GPTConfig, eval_windows: int) -> None:
        self.corpus, self.config = corpus, config
        self.units_per_sample = config.context
        self.training_size = corpus.train.size - config.context
        last = corpus.validation.size - config.context - 1
        places = np.linspace(0, last, eval_windows).astype(np.int64)
        self._validation = [places[at : at + EVAL_BATCH] for at in range(0, eval_windows, EVAL_BATCH)]
        self.validation_size = len(self._validation)

    def settings(self) -> dict[str, Any]:
        data = {"source": self.corpus.source, "training_bytes": self.corpus.train.size}
        return {"data": data, "model": asdict(self.config)}

    def describe(self) -> str:
        return self.corpus.describe()

    def model(self) -> nn.Module:
        return GPT(self.config)

    def training_batch(self, samples: Draw) -> Batch:
        return cut_windows(self.corpus.train, samples.places, self.config.context)

    def validation_batch(self, number: int) -> Batch:
        return cut_windows(self.corpus.validation, self._validation[number], self.config.context)

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        loss, windows = model(*batch).double(), len(batch[0])
        return torch.stack((loss * windows, torch.full_like(loss, windows)))

    def summary(self, sums: Tensor) -> dict[str, float]:
        return {"val_loss": float(sums[0] / sums[1])}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model's size and the validation's."""
    size, positive = GPTConfig(), integer_from(1)
    parser.add_argument(
        "--eval-windows", type=positive, default=128, help="windows to validate on (default: %(default)s)"
    )
    for name in ("layers", "d_model", "heads", "context"):
        flag, default = "--" + name.replace("_", "-"), getattr(size, name)
        parser.add_argument(flag, type=positive, default=default, help="size of the model (default: %(default)s)")
