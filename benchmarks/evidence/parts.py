"""Where studies find their data: the corpora of launch/, and parts of them where one has to serve both sides.

What settings are chosen on is never what they are judged by. Texts have two corpora to do it with; translation,
click-through and images have one each, which is parted here: by text, by month, by image.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from corpora import CORPORA, DATA
from resnet.data import read_idx

# One English text in so many, with all its translations, is for tuning.
_TUNED_OF = 3
# And the flights until the end of this month.
_LAST_TUNED_MONTH = 4
# And of the training images these, to train on and to validate on; Fashion-MNIST's own order is random.
_TUNED_IMAGES, _TUNED_VALIDATION = 25_000, 5_000


class MissingDataError(ValueError):
    """A corpus that was not fetched; the message says how."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a corpus.

    Attributes:
        corpus: whose.
        make: writes it, from the corpus' folder into an empty one.
    """

    corpus: str
    make: Callable[[Path, Path], None]


def folder_of(name: str) -> Path:
    """Where a corpus or a part lies, or will."""
    return CORPORA[name].folder if name in CORPORA else DATA / name


def prepare(name: str) -> None:
    """Makes a part of a corpus unless it is there; a kill leaves all of it or nothing.

    Raises:
        MissingDataError: where the corpus is not there.
    """
    corpus = PARTS[name].corpus if name in PARTS else name
    if not folder_of(corpus).is_dir():
        raise MissingDataError(f"{folder_of(corpus)} is not there; `python launch/fetch_data.py {corpus}` fetches it")
    folder = folder_of(name)
    if folder.is_dir():
        return
    scratch = folder.with_name(f".parting-{name}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    PARTS[name].make(folder_of(corpus), scratch)
    scratch.rename(folder)


def _pairs(source: Path, target: Path, *, tuned: bool) -> None:
    english, german = ((source / f"{name}.txt").read_text("utf-8").splitlines() for name in ("en", "de"))
    chosen = [pair for pair in zip(english, german, strict=True) if _is_tuned(pair[0]) == tuned]
    for name, texts in zip(("en", "de"), zip(*chosen, strict=True), strict=True):
        (target / f"{name}.txt").write_text("".join(text + "\n" for text in texts), "utf-8")


def _is_tuned(text: str) -> bool:
    # Other bytes than those by which the translator's own data holds texts out.
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[4:8], "big") % _TUNED_OF == 0


def _flights(source: Path, target: Path, *, tuned: bool) -> None:
    with (source / "flights.csv").open(newline="") as table, (target / "flights.csv").open("w", newline="") as part:
        rows = csv.DictReader(table)
        assert rows.fieldnames is not None, "a table has a head"
        writer = csv.DictWriter(part, rows.fieldnames)
        writer.writeheader()
        writer.writerows(row for row in rows if (int(row["month"]) <= _LAST_TUNED_MONTH) == tuned)


def _images(source: Path, target: Path, *, tuned: bool) -> None:
    for kind, dimensions in (("images-idx3", 3), ("labels-idx1", 1)):
        train, test = (read_idx(source / f"{part}-{kind}-ubyte.gz", dimensions) for part in ("train", "t10k"))
        end = _TUNED_IMAGES + _TUNED_VALIDATION
        found = (train[:_TUNED_IMAGES], train[_TUNED_IMAGES:end]) if tuned else (train[end:], test)
        for part, values in zip(("train", "t10k"), found, strict=True):
            write_idx(target / f"{part}-{kind}-ubyte.gz", values)


def write_idx(file: Path, values: npt.NDArray[np.uint8]) -> None:
    """What `resnet.data.read_idx` reads."""
    head = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    file.write_bytes(gzip.compress(head + values.tobytes(), compresslevel=1))


PARTS = {
    "help_en_de_tuning": Part("help_en_de", lambda source, target: _pairs(source, target, tuned=True)),
    "help_en_de_judged": Part("help_en_de", lambda source, target: _pairs(source, target, tuned=False)),
    "flights_tuning": Part("flights", lambda source, target: _flights(source, target, tuned=True)),
    "flights_judged": Part("flights", lambda source, target: _flights(source, target, tuned=False)),
    "fashion_mnist_tuning": Part("fashion_mnist", lambda source, target: _images(source, target, tuned=True)),
    "fashion_mnist_judged": Part("fashion_mnist", lambda source, target: _images(source, target, tuned=False)),
}
