"""The corpus: found, split and drawn as documented, and refused in words where that can't be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gpt import data
from gpt.data import Corpus, CorpusError, default_corpus, find_texts, load_corpus, split

CONTEXT = 16


@pytest.fixture
def corpus() -> Corpus:
    generator = np.random.default_rng(0)
    return Corpus("noise", *(generator.integers(256, size=size, dtype=np.uint8) for size in (5000, 600)))


@given(st.lists(st.binary(max_size=200), min_size=1, max_size=5))
def test_split_holds_out_the_end_of_every_document(documents: list[bytes]) -> None:
    train, validation = split([np.frombuffer(document, np.uint8) for document in documents])
    kept = [len(document) - round(len(document) * 0.05) for document in documents]
    assert train.tobytes() == b"".join(doc[:cut] for doc, cut in zip(documents, kept, strict=True))
    assert validation.tobytes() == b"".join(doc[cut:] for doc, cut in zip(documents, kept, strict=True))


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deeper/c.txt", ".hidden.txt", "notes.md"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(name * 100)
    assert find_texts(tmp_path) == [tmp_path / name for name in ("a.txt", "b.txt", "deeper/c.txt")]


def test_a_folder_without_txt_files_gives_its_text_files(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("print()")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    assert find_texts(tmp_path) == [tmp_path / "program.py"]


def test_a_single_file_is_the_whole_corpus(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    file.write_bytes(b"0123456789" * 400)
    corpus = load_corpus(file, CONTEXT)
    assert corpus.train.tobytes() + corpus.validation.tobytes() == file.read_bytes()
    assert str(file) in corpus.describe()
    assert "3,800 bytes to train on, 200 held out" in corpus.describe()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "no such file or folder"),
        ("binary.txt", b"a\0b", "not a text file"),
        ("empty.txt", b"", "too small: 0 bytes of training"),
        ("short.txt", b"ab" * 100, "too small: 10 bytes of validation"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=f"{name}: {message}"):
        load_corpus(tmp_path / name, CONTEXT)


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no text files"):
        load_corpus(tmp_path, CONTEXT)


def test_the_default_is_gutenberg_where_set_up_fetched_it(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("Call me Ishmael.")
    source, files = default_corpus(tmp_path)
    assert "Gutenberg" in source
    assert files == [tmp_path / "book.txt"]


def test_the_default_is_python_s_own_source_elsewhere(tmp_path: Path) -> None:
    source, files = default_corpus(tmp_path / "missing")
    assert "standard library" in source
    assert "ast.py" in {file.name for file in files}
    assert sum(file.stat().st_size for file in files) > 5_000_000


def test_targets_are_the_tokens_one_byte_on(corpus: Corpus) -> None:
    tokens, targets = data.cut_windows(corpus.train, [0, 5, 7, 100, 33], CONTEXT)
    assert tokens.shape == targets.shape == (5, CONTEXT)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert all(window.numpy().astype(np.uint8).tobytes() in corpus.train.tobytes() for window in tokens)
