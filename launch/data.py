"""A corpus of bytes: read from text files, split, and drawn in batches that only seed and step determine."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bytes = npt.NDArray[np.uint8]

# Where set-up puts the Gutenberg texts.
GUTENBERG = Path(__file__).resolve().parent.parent / "data" / "gutenberg"

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


def training_batch(
    corpus: Corpus, context: int, *, seed: int, step: int, part: int, parts: int, windows: int
) -> tuple[Tensor, Tensor]:
    """One micro-batch of a step, drawn at random places of the training text.

    The step's windows are drawn together and dealt out in parts, one per rank and micro-step. So a resumed
    run goes on as if it had never stopped, and a step's windows are the same however many ranks share them.

    Args:
        part, parts: which of how many micro-batches of this step, over all ranks.
        windows: windows in a micro-batch.

    Returns:
        Tokens and targets, int64 [windows, context]; the targets are the tokens one byte on.
    """
    places = np.random.default_rng((seed, step)).integers(corpus.train.size - context, size=parts * windows)
    return cut_windows(corpus.train, places[part * windows : (part + 1) * windows], context)


def validation_batches(
    corpus: Corpus, context: int, *, windows: int, batch: int, rank: int, world_size: int
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """This rank's share of the validation windows, which are the same for every run and world size.

    Every rank gets equally many batches, for the sake of collectives in a forward pass; those beyond its
    share are repetitions of weight 0.

    Yields:
        Tokens, targets (as `training_batch`) and the batch's weight, the number of its windows.
    """
    places = np.linspace(0, corpus.validation.size - context - 1, windows).astype(np.int64)
    batches = [places[at : at + batch] for at in range(0, windows, batch)]
    for first in range(0, len(batches), world_size):
        mine = first + rank
        repeated = mine >= len(batches)
        chosen = batches[0 if repeated else mine]
        yield *cut_windows(corpus.validation, chosen, context), 0 if repeated else len(chosen)


def cut_windows(text: Bytes, places: Iterable[int], context: int) -> tuple[Tensor, Tensor]:
    """Windows of `context` bytes at `places`, and the same windows one byte on."""
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
