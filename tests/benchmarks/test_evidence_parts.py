"""Corpora that are parted: what settings are chosen on is not what they are judged by."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.evidence import parts
from benchmarks.evidence.parts import PARTS, MissingDataError, folder_of, prepare, write_idx
from corpora import CORPORA
from dlrm.data import load_flights
from resnet.data import load_images
from tests.launch.dlrm.test_dlrm import write_flights
from translation.data import load_translations


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of data in which every corpus of this test is made where it would be fetched to."""
    monkeypatch.setattr(parts, "DATA", tmp_path)
    monkeypatch.setattr("corpora.DATA", tmp_path)
    return tmp_path


def both(corpus: str) -> tuple[Path, Path]:
    names = [f"{corpus}_{side}" for side in ("tuning", "judged")]
    for name in names:
        assert PARTS[name].corpus == corpus
        prepare(name)
    return folder_of(names[0]), folder_of(names[1])


def test_a_text_s_translations_are_on_one_side(data: Path) -> None:
    english = [f"sentence number {number % 150}" for number in range(200)]
    (data / "help_en_de").mkdir()
    for name, lines in (("en", english), ("de", [f"{text} auf Deutsch" for text in english])):
        (data / "help_en_de" / f"{name}.txt").write_text("".join(line + "\n" for line in lines))
    sides = [(folder / "en.txt").read_text().splitlines() for folder in both("help_en_de")]
    assert sorted(sides[0] + sides[1]) == sorted(english)
    assert not set(sides[0]) & set(sides[1])
    assert 0.2 < len(sides[0]) / len(english) < 0.5
    for folder in both("help_en_de"):
        loaded = load_translations(folder, 300, 32, data / "cache")
        assert len(loaded.train) > len(loaded.validation) > 0


def test_flights_are_parted_by_month(data: Path) -> None:
    source = write_flights(data / "flights")
    rows = list(csv.DictReader((source / "flights.csv").open(newline="")))
    for number, row in enumerate(rows):
        row["month"] = str(number % 12 + 1)
    with (source / "flights.csv").open("w", newline="") as table:
        writer = csv.DictWriter(table, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    months = [{int(row["month"]) for row in csv.DictReader((f / "flights.csv").open())} for f in both("flights")]
    assert months == [set(range(1, 5)), set(range(5, 13))]
    assert all(len(load_flights(folder).train) for folder in both("flights"))


def test_images_are_parted_and_the_test_set_is_judged_by_alone(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_TUNED_IMAGES", 5)
    monkeypatch.setattr(parts, "_TUNED_VALIDATION", 2)
    (data / "fashion_mnist").mkdir()
    for name, count, first in (("train", 12, 0), ("t10k", 4, 100)):
        numbers = np.arange(first, first + count, dtype=np.uint8)
        images = np.broadcast_to(numbers[:, None, None], (count, 2, 3)).copy()
        write_idx(data / "fashion_mnist" / f"{name}-images-idx3-ubyte.gz", images)
        write_idx(data / "fashion_mnist" / f"{name}-labels-idx1-ubyte.gz", numbers)
    found = [[list(part.labels) for part in load_images(folder)] for folder in both("fashion_mnist")]
    assert found == [[[0, 1, 2, 3, 4], [5, 6]], [[7, 8, 9, 10, 11], [100, 101, 102, 103]]]
    for folder in both("fashion_mnist"):
        for part in load_images(folder):
            assert (part.images == part.labels[:, None, None]).all()


def test_a_part_is_made_once_and_not_of_what_is_missing(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingDataError, match=r"flights is not there; `python launch/fetch_data.py flights`"):
        prepare("flights_tuning")
    with pytest.raises(MissingDataError, match="gutenberg"):
        prepare("gutenberg")
    made = []

    def make(_: Path, target: Path) -> None:
        made.append(target)
        (target / "part.txt").write_text("here")
        if len(made) == 1:
            raise KeyboardInterrupt

    monkeypatch.setitem(PARTS, "flights_tuning", replace(PARTS["flights_tuning"], make=make))
    (data / "flights").mkdir()
    with pytest.raises(KeyboardInterrupt):
        prepare("flights_tuning")
    assert not folder_of("flights_tuning").exists()
    for _ in range(2):
        prepare("flights_tuning")
    assert (folder_of("flights_tuning") / "part.txt").read_text() == "here"
    assert len(made) == 2
    assert folder_of("flights") == CORPORA["flights"].folder
