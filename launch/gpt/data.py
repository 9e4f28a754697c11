"""A corpus of bytes: read from text files, split, and cut into windows."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bytes = npt.NDArray[np.uint8]

# Where set-up puts the Gutenberg texts.
GUTENBERG = Path(__file__).resolve().parents[2] / "data" / "gutenberg"

# The end of every document that is held out for validation.
HELD_OUT = 0.05

# How much of a file is looked at to tell text from binary data.
_SNIFFED_BYTES = 8192


class CorpusError(ValueError):
    """A corpus that can't be read or is too small; the message names the path."""


@dataclass(frozen=True)
class Corpus:
    """Training and validation text as bytes, and in words where they come from."""

    source: str
    train: Bytes
    validation: Bytes

    def describe(self) -> str:
        return f"{self.source}: {self.train.size:,} bytes to train on, {self.validation.size:,} held out"


def load_corpus(path: Path | None, context: int) -> Corpus:
    """Reads a text file or a folder of them; without `path` Gutenberg's books, or else Python's own source.

    The last 5% of every document is held out, so both parts hold every document's kind of text.

    Args:
        path: a text file, or a folder: all `*.txt` below it, or where there are none all text files below it.
        context: the length of the windows that will be drawn, in bytes.

    Raises:
        CorpusError: where there is no text, or too little for one window of `context` bytes in each part.
    """
    if path is None:
        source, files = default_corpus()
    else:
        source, files = str(path), find_texts(path)
    train, validation = split([read_bytes(file) for file in files])
    for name, part in (("training", train), ("validation", validation)):
        if part.size <= context:
            raise CorpusError(f"{source}: too small: {part.size} bytes of {name} text, context {context} needs more")
    return Corpus(source, train, validation)


def default_corpus(gutenberg: Path = GUTENBERG) -> tuple[str, list[Path]]:
    """The corpus of a call without `--data`: its description and its files."""
    if gutenberg.is_dir():
        return "Project Gutenberg selection", find_texts(gutenberg)
    library = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in sorted(library.rglob("*.py")) if "site-packages" not in file.parts]
    return f"source of Python's standard library ({gutenberg} is not there)", files


def find_texts(path: Path) -> list[Path]:
    """The text files that `path` stands for, in an order that is the same on every machine.

    Raises:
        CorpusError: where `path` doesn't exist or holds no text.
    """
    if path.is_file():
        if not _is_text(path):
            raise CorpusError(f"{path}: not a text file")
        return [path]
    if not path.is_dir():
        raise CorpusError(f"{path}: no such file or folder")
    files = sorted(file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path)))
    texts = [file for file in files if file.suffix == ".txt"] or [file for file in files if _is_text(file)]
    if not texts:
        raise CorpusError(f"{path}: no text files in this folder")
    return texts


def read_bytes(path: Path) -> Bytes:
    """A file's bytes, mapped rather than read."""
    if path.stat().st_size == 0:
        return np.empty(0, np.uint8)
    return np.memmap(path, np.uint8, mode="r")


def split(documents: Iterable[Bytes]) -> tuple[Bytes, Bytes]:
    """Cuts the end off every document; returns what is left and the ends, each joined in order."""
    train, validation = [], []
    for document in documents:
        cut = document.size - round(document.size * HELD_OUT)
        train.append(document[:cut])
        validation.append(document[cut:])
    return _join(train), _join(validation)


def cut_windows(text: npt.NDArray[np.integer[Any]], places: Iterable[int], context: int) -> tuple[Tensor, Tensor]:
    """Windows of `context` bytes or tokens at `places`, and the same windows one on: int64 [places, context] each."""
    windows = torch.from_numpy(np.stack([text[at : at + context + 1] for at in places]).astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


def _join(parts: Sequence[Bytes]) -> Bytes:
    # A single file stays mapped: a corpus larger than memory works.
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_text(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" not in file.read(_SNIFFED_BYTES)
