"""What Shampoo names of Megatron's insides is named in one file, and refused by name where a release has moved it."""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ds_shampoo import SettingsError
from ds_shampoo.frameworks import installed
from ds_shampoo.frameworks.megatron import internals
from ds_shampoo.frameworks.megatron.internals import MEGATRON
from ds_shampoo.frameworks.privates import Private
from tests.frameworks.moving import move

megatron = pytest.importorskip("megatron.core")
PACKAGE = Path(internals.__file__).parents[2]
FOLDERS = ("frameworks/megatron", "frameworks/megatron_deepspeed", "testing")
HERE = [name for name in (*internals.NAMES, *internals.SETTINGS) if name.since <= MEGATRON.release()]
# Of these names Megatron's configurations and our own objects have others.
ELSEWHERE = {"optimizer", "sequence_parallel"}


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """The check runs once per process: here it is to run again, and afterwards too."""
    installed._check.cache_clear()
    yield
    installed._check.cache_clear()


def test_the_installed_release_has_all_of_it() -> None:
    MEGATRON.check()


@pytest.mark.parametrize("name", HERE, ids=str)
def test_what_is_gone_is_refused_by_name(name: Private, monkeypatch: pytest.MonkeyPatch) -> None:
    move(monkeypatch, name)
    with pytest.raises(SettingsError) as refusal:
        MEGATRON.check()
    assert f"megatron-core {megatron.__version__} lacks what Shampoo needs" in str(refusal.value)
    assert f"{name} (" in str(refusal.value)
    assert "tested with megatron-core 0.19.2: install that" in str(refusal.value)


@pytest.mark.parametrize("name", internals.STOOD_IN_FOR, ids=str)
def test_what_the_cpu_stands_in_for_is_refused_too(name: Private, monkeypatch: pytest.MonkeyPatch) -> None:
    move(monkeypatch, name)
    with pytest.raises(SettingsError, match=r"lacks what Shampoo needs of it"):
        internals.stand_in_for_cuda(
            get_rng_state=untouched, set_rng_state=untouched, causal_mask=untouched, norm=untouched
        )


def test_what_has_become_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def others(model: Any, config: Any) -> None: ...

    monkeypatch.setattr("megatron.core.optimizer._get_param_groups", others)
    with pytest.raises(SettingsError, match=r"optimizer._get_param_groups \(it takes .*: too many positional"):
        MEGATRON.check()


def test_all_that_moved_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    several = [name for name in HERE if name.name in ("main_param", "partition_dim", "fp8")]
    for name in several:
        move(monkeypatch, name)
    with pytest.raises(SettingsError) as refusal:
        MEGATRON.check()
    assert all(f"{name} (" in str(refusal.value) for name in several)


def test_a_newer_release_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    unnamed = replace(MEGATRON, names=())
    monkeypatch.delenv("RANK", raising=False)
    with caplog.at_level(logging.WARNING, "ds_shampoo"):
        for version in ("0.16.1", "0.19.9", "0.20.0rc1", "0.20.0rc1"):
            monkeypatch.setattr(megatron, "__version__", version)
            unnamed.check()
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith("Shampoo was tested with megatron-core 0.19.2, not with 0.20.0rc1")


def test_a_release_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "__version__", "0.15.2")
    with pytest.raises(SettingsError, match=r"megatron-core 0.15.2: Shampoo needs 0.16 or newer"):
        MEGATRON.check()


@pytest.mark.parametrize("path", [p for f in FOLDERS for p in sorted((PACKAGE / f).glob("*.py"))], ids=lambda p: p.name)
def test_no_other_file_names_them(path: Path) -> None:
    if path == Path(internals.__file__):
        return
    private = {name.name for name in (*internals.NAMES, *internals.STOOD_IN_FOR)}
    found = set(named(ast.parse(path.read_text())))
    assert not {name for name in found & private if name not in ELSEWHERE or name in constants(path)}
    assert not {name for name in imported(path) if name.startswith("_")}


def test_the_test_finds_names() -> None:
    source = "from megatron.core.optimizer import _get_param_groups\nx.main_param\ngetattr(p, 'partition_dim')"
    assert {"_get_param_groups", "main_param", "partition_dim"} <= set(named(ast.parse(source)))


def named(tree: ast.AST) -> Iterator[str]:
    """The names that code asks for: attributes, what it imports, and strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name.rpartition(".")[2]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def constants(path: Path) -> set[str]:
    return {
        node.value
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def imported(path: Path) -> set[str]:
    """What a file imports from Megatron."""
    return {
        alias.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron")
        for alias in node.names
    }


def untouched(*_: Any, **__: Any) -> Any:
    raise AssertionError("nothing is to be replaced where something is missing")
