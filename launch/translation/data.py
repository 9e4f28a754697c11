"""Pairs of texts in two languages as tokens, split into training and validation by what the first one says."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tokenization import END, train_bpe
from vocabulary import Tokens, tokenized

# Padding, the start and the end of a text: BPE's one special token, which is number 0, serves as all three.
PAD = START = STOP = 0

# One pair in so many is held out.
HELD_OUT_OF = 20


class PairsError(ValueError):
    """Texts that can't be read or don't belong together; the message names the folder."""


@dataclass(frozen=True)
class Pairs:
    """Texts and their translations, both as tokens without START and STOP."""

    sources: Sequence[Tokens]
    targets: Sequence[Tokens]

    def __len__(self) -> int:
        return len(self.sources)


@dataclass(frozen=True)
class Translations:
    """What a model is trained and judged on.

    Attributes:
        references: the validation pairs' translations as text.
    """

    tokenizer: Tokenizer
    train: Pairs
    validation: Pairs
    references: Sequence[str]


def load_translations(folder: Path, vocabulary: int, longest: int, cache: Path) -> Translations:
    """Reads `en.txt` and `de.txt`, line by line the same text.

    Every pair of one English text is on the same side of the split. Pairs with more than `longest` tokens are left out
    of training; in validation they are cut.

    Raises:
        PairsError: where a file is missing, they differ in length, or nothing is left.
    """
    try:
        english, german = ((folder / f"{name}.txt").read_text("utf-8").splitlines() for name in ("en", "de"))
    except (OSError, UnicodeDecodeError) as error:
        raise PairsError(f"{folder}: {error}") from None
    if len(english) != len(german):
        raise PairsError(f"{folder}: {len(english)} lines of English but {len(german)} of German")
    held_out = np.array([_is_held_out(text) for text in english], bool)
    parts = {"train": np.flatnonzero(~held_out), "validation": np.flatnonzero(held_out)}
    if any(not len(lines) for lines in parts.values()):
        raise PairsError(f"{folder}: {len(english)} pairs are too few to split")
    texts = {
        f"{part}_{language}": [lines[at] for at in chosen]
        for part, chosen in parts.items()
        for language, lines in (("en", english), ("de", german))
    }
    found = tokenized(texts, vocabulary, train_bpe, cache)
    if found.tokenizer.token_to_id(END) != PAD:
        raise PairsError(f"{folder}: the special token of the tokenizer is not number {PAD}")
    pairs = list(zip(found.texts("train_en"), found.texts("train_de"), strict=True))
    short = [pair for pair in pairs if max(map(len, pair)) <= longest]
    if not short:
        raise PairsError(f"{folder}: every pair has more than {longest} tokens")
    train = Pairs(*zip(*short, strict=True))
    validation = Pairs(
        [text[:longest] for text in found.texts("validation_en")],
        [text[:longest] for text in found.texts("validation_de")],
    )
    return Translations(found.tokenizer, train, validation, texts["validation_de"])


def batch_of(pairs: Pairs, chosen: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Source, what the decoder is given, and what it has to say: int64 [n, length], padded to the longest each."""
    sources = [pairs.sources[at] for at in chosen]
    targets = [pairs.targets[at] for at in chosen]
    given = [np.concatenate([[START], text]) for text in targets]
    # STOP is the padding's number too; where it is to be learned, is one place after each text's end.
    said = [np.concatenate([text, [STOP]]) for text in targets]
    return padded(sources), padded(given), padded(said, IGNORED)


# A target that doesn't count in the loss.
IGNORED = -100


def padded(texts: Sequence[Tokens], padding: int = PAD) -> Tensor:
    """int64 [n, length of the longest]."""
    rows = np.full((len(texts), max(1, *map(len, texts))), padding, np.int64)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text)] = text
    return torch.from_numpy(rows)


def _is_held_out(text: str) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) % HELD_OUT_OF == 0
