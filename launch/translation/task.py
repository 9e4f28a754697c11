"""Translation of manuals from English to German, judged by log-perplexity, and by BLEU at the end."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any

import sacrebleu
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor, nn

from command_line import integer_from
from metric import Metric
from sampling import Draw
from task import Batch, Task
from translation.data import IGNORED, PAD, Translations, batch_of, padded
from translation.model import Translator, TranslatorConfig

# Pairs in one forward pass of an evaluation, and how many of the first are translated for BLEU.
EVAL_BATCH = 64
TRANSLATED = 256


class TranslationTask(Task):
    """A text in another language."""

    metric = Metric("val_loss", "log-perplexity per token", "lower")
    unit = "pairs"
    units_per_sample = 1

    def __init__(self, data: Translations, config: TranslatorConfig, *, autocast: bool) -> None:
        self._data, self.config, self._autocast = data, config, autocast
        self.training_size = len(data.train)
        self.validation_size = -(-len(data.validation) // EVAL_BATCH)

    def settings(self) -> dict[str, Any]:
        return {"data": {"training_pairs": len(self._data.train)}, "model": asdict(self.config)}

    def describe(self) -> str:
        return f"{len(self._data.train):,} pairs to train on, {len(self._data.validation):,} held out"

    def model(self) -> nn.Module:
        return Translator(self.config)

    def training_batch(self, samples: Draw) -> Batch:
        return batch_of(self._data.train, samples.places.tolist())

    def validation_batch(self, number: int) -> Batch:
        pairs = self._data.validation
        return batch_of(pairs, range(number * EVAL_BATCH, min((number + 1) * EVAL_BATCH, len(pairs))))

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        tokens = (batch[2] != IGNORED).sum().double()
        return torch.stack([model(*batch).double() * tokens, tokens])

    def summary(self, sums: Tensor) -> dict[str, float]:
        return {"val_loss": float(sums[0] / sums[1])}

    def final(self, model: nn.Module) -> Mapping[str, float]:
        """BLEU of greedy translations of the first validation texts (Post 2018, sacrebleu)."""
        assert isinstance(model, Translator)
        device = next(model.parameters()).device
        sources, translated = self._data.validation.sources[:TRANSLATED], []
        for first in range(0, len(sources), EVAL_BATCH):
            with self._precision():
                tokens = model.translate(padded(sources[first : first + EVAL_BATCH]).to(device)).tolist()
            translated += [[token for token in text if token != PAD] for text in tokens]
        texts = self._data.tokenizer.decode_batch(translated)
        references = [list(self._data.references[: len(texts)])]
        return {"final_BLEU": sacrebleu.corpus_bleu(texts, references).score}

    def _precision(self) -> AbstractContextManager[object]:
        # What the engine's own forward has around it is not there where the module is called by itself.
        return torch.autocast(get_accelerator().device_name(), torch.bfloat16) if self._autocast else nullcontext()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model's size."""
    size, positive = TranslatorConfig(), integer_from(1)
    for name in ("layers", "d_model", "heads", "longest", "vocab"):
        flag, default = "--" + name.replace("_", "-"), getattr(size, name)
        parser.add_argument(flag, type=positive, default=default, help="size of the model (default: %(default)s)")
