"""Pretraining of a BERT by masked tokens, judged by how many it gets right on held-out text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bert.model import Bert, BertConfig
from command_line import integer_from
from corpora import DATA
from gpt.data import Corpus, load_corpus
from metric import Metric
from sampling import Draw
from task import Batch, Task
from tokenization import BERT_TOKENS, MASK, train_wordpiece
from vocabulary import TokenizedTexts, tokenized

# Devlin et al. 2019, section 3.1: this part of the tokens is asked for; of those so many are masked, so many random.
ASKED, MASKED, RANDOM = 0.15, 0.8, 0.1
# Windows in one forward pass of an evaluation.
EVAL_BATCH = 32


class BertTask(Task):
    """The masked tokens of a text."""

    metric = Metric("val_accuracy", "masked accuracy", "higher")
    unit = "tokens"

    def __init__(self, source: str, texts: TokenizedTexts, config: BertConfig) -> None:
        self._source, self.config = source, config
        self._train, self._validation = texts.flat("train"), texts.flat("validation")
        self._mask = texts.tokenizer.token_to_id(MASK)
        self.units_per_sample = config.context
        self.training_size = len(self._train) - config.context
        self._windows = len(self._validation) // config.context
        self.validation_size = -(-self._windows // EVAL_BATCH)

    def settings(self) -> dict[str, Any]:
        data = {"source": self._source, "training_tokens": len(self._train)}
        return {"data": data, "model": asdict(self.config)}

    def describe(self) -> str:
        return f"{self._source}: {len(self._train):,} tokens to train on, {len(self._validation):,} held out"

    def model(self) -> nn.Module:
        return Bert(self.config)

    def training_batch(self, samples: Draw) -> Batch:
        return self._batch(self._train, samples.places, samples.keys)

    def validation_batch(self, number: int) -> Batch:
        windows = np.arange(number * EVAL_BATCH, min((number + 1) * EVAL_BATCH, self._windows))
        # The same masks at every validation of every run.
        return self._batch(self._validation, windows * self.config.context, [(int(window),) for window in windows])

    def measure(self, model: nn.Module, batch: Batch) -> Tensor:
        targets = batch[2]
        logits = model(*batch, logits=True)
        loss = F.cross_entropy(logits, targets, reduction="sum").double()
        right = (logits.argmax(dim=1) == targets).sum().double()
        return torch.stack([loss, right, torch.full_like(right, len(targets))])

    def summary(self, sums: Tensor) -> dict[str, float]:
        return {"val_accuracy": float(sums[1] / sums[2]), "val_loss": float(sums[0] / sums[2])}

    def _batch(self, text: npt.NDArray[np.int32], places: Sequence[int], keys: Sequence[tuple[int, ...]]) -> Batch:
        windows = np.stack([text[at : at + self.config.context] for at in places]).astype(np.int64)
        shown = windows.copy()
        asked = []
        for row, key in enumerate(keys):
            columns = self._hide(shown[row], np.random.default_rng(key))
            asked.append(row * self.config.context + columns)
        chosen = np.concatenate(asked)
        return torch.from_numpy(shown), torch.from_numpy(chosen), torch.from_numpy(windows.reshape(-1)[chosen])

    def _hide(self, window: npt.NDArray[np.int64], rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Masks a window in place, and returns which of its tokens are asked for."""
        count = max(1, round(ASKED * len(window)))
        columns = rng.permutation(len(window))[:count]
        fate = rng.random(count)
        window[columns[fate < MASKED]] = self._mask
        replaced = columns[(fate >= MASKED) & (fate < MASKED + RANDOM)]
        window[replaced] = rng.integers(len(BERT_TOKENS), self.config.vocab, len(replaced))
        return columns


def make_task(path: Path, config: BertConfig) -> BertTask:
    """Reads text files (`gpt.data.load_corpus`), and trains or reads a tokenizer.

    Raises:
        CorpusError: where there is no text.
    """
    corpus = load_corpus(path, config.context)
    return BertTask(corpus.source, _tokens(corpus, config.vocab), config)


def _tokens(corpus: Corpus, vocabulary: int) -> TokenizedTexts:
    parts = {"train": corpus.train, "validation": corpus.validation}
    lines = {name: part.tobytes().decode("utf-8", "ignore").splitlines() for name, part in parts.items()}
    return tokenized(lines, vocabulary, train_wordpiece, DATA / ".tokenized")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model's size."""
    size, positive = BertConfig(), integer_from(1)
    for name in ("layers", "d_model", "heads", "context", "vocab"):
        flag, default = "--" + name.replace("_", "-"), getattr(size, name)
        parser.add_argument(flag, type=positive, default=default, help="size of the model (default: %(default)s)")
