"""Pretraining of a GPT, judged by its loss on held-out text."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from command_line import integer_from
from gpt.build import build_gpt
from gpt.data import cut_windows
from gpt.model import ARCHITECTURES, MLPS, GPTConfig
from gpt.tokens import BYTES, SMALLEST_BPE, TokenCorpus
from metric import Metric
from sampling import Draw
from task import Batch, Task

# Windows in one forward pass of an evaluation.
EVAL_BATCH = 8


class GPTTask(Task):
    """The next token of a text.

    Losses are in nats per byte whatever a token is, so runs with different vocabularies can be compared; where a token
    is more than a byte, the records have them in nats per token too. Of a validation both are exact. Of a training
    step the loss per byte is the one per token over the mean token's bytes in the training text.
    """

    metric = Metric("val_loss", "loss (nats per byte)", "lower")
    unit = "tokens"

    def __init__(self, corpus: TokenCorpus, config: GPTConfig, eval_windows: int) -> None:
        self.corpus, self.config = corpus, config
        self.units_per_sample = config.context
        self.training_size = corpus.train.size - config.context
        self._told_per_token = corpus.tokenizer != BYTES
        self._bytes_per_token = corpus.bytes_per_token if self._told_per_token else 1.0
        last = corpus.validation.size - config.context - 1
        places = np.linspace(0, last, eval_windows).astype(np.int64)
        self._validation = [places[at : at + EVAL_BATCH] for at in range(0, eval_windows, EVAL_BATCH)]
        self.validation_size = len(self._validation)

    def settings(self) -> dict[str, Any]:
        text, tokenizer = self.corpus.text, self.corpus.tokenizer
        data = {"source": text.source, "training_bytes": text.train.size, "tokenizer": tokenizer}
        return {"data": data, "model": asdict(self.config)}

    def describe(self) -> str:
        described = self.corpus.text.describe()
        if not self._told_per_token:
            return described
        return (
            f"{described}; {self.corpus.tokenizer}, in training of {self._bytes_per_token:.2f} bytes each: loss and "
            "val_loss are in nats per byte, loss_per_token and val_loss_per_token in nats per token"
        )

    def model(self) -> nn.Module:
        return build_gpt(self.config)

    def training_batch(self, samples: Draw) -> Batch:
        return cut_windows(self.corpus.train, samples.places, self.config.context)

    def training_record(self, loss: float) -> dict[str, float]:
        per_token = {"loss_per_token": loss} if self._told_per_token else {}
        return {"loss": loss / self._bytes_per_token, **per_token}

    def validation_batch(self, number: int) -> Batch:
        return cut_windows(self.corpus.validation, self._validation[number], self.config.context)

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        targets = batch[1]
        tokens = torch.tensor(targets.numel(), dtype=torch.float64, device=targets.device)
        size = self.corpus.widths.to(targets.device)[targets].sum().double()
        return torch.stack((model(*batch).double() * tokens, tokens, size))

    def summary(self, sums: Tensor) -> dict[str, float]:
        nats, tokens, size = sums.tolist()
        per_token = {"val_loss_per_token": nats / tokens} if self._told_per_token else {}
        return {"val_loss": nats / size, **per_token}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model's size and kind, its vocabulary, and the validation's size."""
    size, positive = GPTConfig(), integer_from(1)
    parser.add_argument(
        "--eval-windows", type=positive, default=128, help="windows to validate on (default: %(default)s)"
    )
    for name in ("layers", "d_model", "heads", "context"):
        flag, default = "--" + name.replace("_", "-"), getattr(size, name)
        parser.add_argument(flag, type=positive, default=default, help="size of the model (default: %(default)s)")
    parser.add_argument(
        "--architecture",
        choices=ARCHITECTURES,
        default=size.architecture,
        help="modern: rotary positions, RMSNorm, normalised queries and keys (default: %(default)s)",
    )
    parser.add_argument(
        "--mlp", choices=MLPS, help=f"feed-forward half of the modern architecture (default: {size.mlp})"
    )
    parser.add_argument(
        "--vocabulary",
        type=_vocabulary,
        default=BYTES,
        metavar=f"{BYTES}|N",
        help="a token is a byte, or one of N of a BPE that is trained on the text once (default: %(default)s)",
    )


def config_of(arguments: argparse.Namespace) -> GPTConfig:
    """The model that a command line asks for.

    Raises:
        ValueError: where it is impossible.
    """
    if arguments.mlp and arguments.architecture != "modern":
        raise ValueError(f"--mlp {arguments.mlp} is for --architecture modern, not {arguments.architecture}")
    return GPTConfig(
        layers=arguments.layers,
        d_model=arguments.d_model,
        heads=arguments.heads,
        context=arguments.context,
        vocab=256 if arguments.vocabulary == BYTES else arguments.vocabulary,
        architecture=arguments.architecture,
        mlp=arguments.mlp or GPTConfig.mlp,
    )


def _vocabulary(text: str) -> str | int:
    if text == BYTES:
        return text
    if not text.isdecimal() or int(text) < SMALLEST_BPE:
        raise argparse.ArgumentTypeError(f"{text!r}: must be {BYTES!r} or a number from {SMALLEST_BPE} on")
    return int(text)
