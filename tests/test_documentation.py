"""What the documents name is there: settings with their defaults, and tests."""

from __future__ import annotations

import ast
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest

from ds_shampoo import Shampoo, ShampooConfig
from ds_shampoo.config import GroupSettings

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FIELDS = ShampooConfig.model_fields


def _table() -> list[tuple[str, Any]]:
    """The keys of README's table of settings with their defaults, in its order."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Settings\n")[1].split("\n## ")[0]
    found = []
    for row in re.findall(r"^\| (`.*?) \| (.*?) \|", section, re.MULTILINE):
        keys, defaults = re.findall(r"`(\w+)`", row[0]), json.loads(f"[{row[1]}]")
        found += zip(keys, defaults, strict=True)
    return found


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_the_table_of_settings() -> None:
    assert sorted(key for key, _ in _table()) == sorted(FIELDS)
    assert dict(_table()) == {key: _plain(field.default) for key, field in FIELDS.items()}


def test_a_groups_own_settings_stand_first() -> None:
    """README and the docstring say that a param group may set those from `lr` to `max_root_failures`."""
    own = set(GroupSettings.model_fields)
    for keys in ([key for key, _ in _table()], _arguments()[1:-2]):
        assert set(keys[: len(own)]) == own
        assert keys[0] == "lr"
        assert keys[len(own) - 1] == "max_root_failures"


def _arguments() -> list[str]:
    """The names under "Args" in the optimizer's docstring, in its order."""
    section = inspect.getdoc(Shampoo).split("Args:\n")[1].split("\n\n")[0]  # type: ignore[union-attr]
    names = re.findall(r"^    (\w+(?:, \w+)*): ", section, re.MULTILINE)
    return [name for line in names for name in line.split(", ")]


def test_the_docstring() -> None:
    assert sorted(_arguments()) == sorted([*FIELDS, "params", "model", "layout"])


def test_the_signature() -> None:
    parameters = inspect.signature(Shampoo).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name in FIELDS}
    assert defaults == {key: field.default for key, field in FIELDS.items()}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tests_that_are_named_exist(document: Path) -> None:
    """By a whole name, by its beginning and an ellipsis, or by a file."""
    files = list((ROOT / "tests").rglob("test_*.py"))
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    functions = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    paths = {str(file.relative_to(ROOT)) for file in files}
    text = document.read_text(encoding="utf-8")
    for path in re.findall(r"tests/[\w/]*\.py", text):
        assert (ROOT / path).is_file(), path
    for name, end in re.findall(r"\b(test_\w+)(\.py|…|)", text):
        if end == ".py":
            assert any(path.endswith(f"/{name}.py") for path in paths), name
        elif end:
            assert any(function.startswith(name) for function in functions), name
        else:
            assert name in functions, name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    """To a file of the repository, and to a heading of it."""
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", document.read_text(encoding="utf-8")):
        path, _, heading = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        if heading:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, link


def test_the_trainers_page_shows_the_examples() -> None:
    """Its Python that names a file is that file's own text, and its JSON that of examples/zero2.json."""
    page = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
    assert re.findall(r"```json\n(.*?)```", page, re.DOTALL) == [(ROOT / "examples" / "zero2.json").read_text()]
    shown = re.findall(r"```python\n# (\S+\.py)\n(.*?)```", page, re.DOTALL)
    assert len(shown) >= 3
    for path, text in shown:
        assert text in (ROOT / path).read_text(encoding="utf-8"), path
