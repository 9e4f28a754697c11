"""Texts as tokens: a tokenizer trained on them once, kept with what it made of them for every later run."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

Tokens = npt.NDArray[np.int32]


class TokenizedTexts:
    """Named lists of texts as tokens.

    Attributes:
        tokenizer: trained on the texts named "train".
    """

    def __init__(self, folder: Path) -> None:
        """Reads what `tokenized` kept."""
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._arrays = np.load(folder / "tokens.npz")

    def flat(self, name: str) -> Tokens:
        """All texts of this name, one after the other."""
        return self._arrays[name]

    def texts(self, name: str) -> list[Tokens]:
        """The texts of this name."""
        return np.split(self._arrays[name], self._arrays[f"{name}_ends"][:-1])


def tokenized(
    texts: Mapping[str, Sequence[str]],
    vocabulary: int,
    train: Callable[[Iterable[str], int], Tokenizer],
    cache: Path,
) -> TokenizedTexts:
    """The texts as tokens, out of `cache` where an earlier call with the same texts left them there.

    Several processes may call this at once: each that finds nothing makes its own, and one of them stays. What one
    run of `tokenizers` makes of a text another may number differently, hence a single one for all runs.

    Args:
        texts: lists of texts by name; the tokenizer is trained on those named "train", and on all whose names begin
            so.
        train: trains a tokenizer of so many tokens.
        cache: a folder.
    """
    mark = hashlib.sha256(f"{train.__name__} {vocabulary}".encode())
    for name, part in texts.items():
        mark.update(name.encode())
        for text in part:
            mark.update(text.encode() + b"\0")
    folder = cache / mark.hexdigest()[:16]
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=cache, prefix=".making-"))
        try:
            _write(texts, vocabulary, train, scratch)
            _keep(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return TokenizedTexts(folder)


def _write(
    texts: Mapping[str, Sequence[str]],
    vocabulary: int,
    train: Callable[[Iterable[str], int], Tokenizer],
    folder: Path,
) -> None:
    tokenizer = train((text for name, part in texts.items() if name.startswith("train") for text in part), vocabulary)
    tokenizer.save(str(folder / "tokenizer.json"))
    arrays = {}
    for name, part in texts.items():
        tokens = [encoding.ids for encoding in tokenizer.encode_batch(list(part), add_special_tokens=False)]
        arrays[name] = np.fromiter((token for text in tokens for token in text), np.int32)
        arrays[f"{name}_ends"] = np.cumsum([len(text) for text in tokens], dtype=np.int64)
    np.savez(folder / "tokens.npz", **arrays)


def _keep(scratch: Path, folder: Path) -> None:
    try:
        os.rename(scratch, folder)  # noqa: PTH104 - fails where another process was first, as Path.rename may not
    except OSError:
        if not folder.is_dir():
            raise
