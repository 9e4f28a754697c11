"""What is done with a module once it has been imported, whenever that is."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from ds_shampoo.frameworks.deepspeed.imports import when_imported

NAME = "a_module_of_this_test"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Writes the module's source anew; everything is as it was afterwards."""

    def write(source: str) -> None:
        (tmp_path / f"{NAME}.py").write_text(source)
        importlib.invalidate_caches()

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    write("value = 1\n")
    yield write
    sys.modules.pop(NAME, None)


def test_before_and_after_the_import(module: Callable[[str], None]) -> None:
    seen: list[ModuleType] = []
    when_imported(NAME, seen.append)
    assert NAME not in sys.modules
    found = importlib.import_module(NAME)
    assert seen == [found]
    assert found.value == 1
    when_imported(NAME, seen.append)
    assert seen == [found, found]
    importlib.reload(found)
    assert seen == [found, found, found]


def test_it_stays_an_ordinary_module(module: Callable[[str], None]) -> None:
    plain = type(importlib.import_module(NAME).__loader__)
    del sys.modules[NAME]
    when_imported(NAME, lambda _: None)
    found = importlib.import_module(NAME)
    assert type(found.__loader__) is plain
    assert found.__spec__ is not None
    assert found.__spec__.loader is found.__loader__
    assert inspect.getsource(found) == "value = 1\n"


def test_a_module_that_fails_is_passed_over(module: Callable[[str], None]) -> None:
    seen: list[ModuleType] = []
    when_imported(NAME, seen.append)
    module("raise ImportError('not yet')\n")
    with pytest.raises(ImportError, match="not yet"):
        importlib.import_module(NAME)
    assert not seen
    module("value = 22\n")
    importlib.import_module(NAME)
    assert len(seen) == 1


def test_one_that_is_not_there(module: Callable[[str], None]) -> None:
    when_imported("no_such_module_of_this_test", lambda _: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module_of_this_test")
