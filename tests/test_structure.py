"""The package's folders import one way, its files stay small, and calls with many arguments name them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ds_shampoo"

# From top to bottom: each may import what stands below it, and of its own.
LAYERS = (
    ("cli", "megatron"),
    ("frameworks",),
    ("optimizer",),
    ("state", "report"),
    ("step",),
    ("parameters", "roots"),
    ("sharding",),
    ("accelerators",),
    ("config",),
    ("auxiliary", "values"),
    ("algorithm",),
    ("kernels",),
)
# A framework's folder may build on another's where both are at work in one job.
FRAMEWORKS = {"megatron_deepspeed": {"megatron", "deepspeed"}}
FOLDERS = {path.name for path in (PACKAGE / "frameworks").iterdir() if path.is_dir()}

LONGEST = 400

MOST_POSITIONAL = 4
# Called as torch's or Megatron's own are, or by Triton, which knows no other arguments.
AS_OTHERS = {"Shampoo.__init__", "get_megatron_shampoo_optimizer", "GPTPipeline.__init__", "Embedding.__init__"}
AS_OTHERS |= {"move", "squares"}

FILES = sorted(PACKAGE.rglob("*.py"))
IDS = [str(path.relative_to(PACKAGE)) for path in FILES]


def room(parts: tuple[str, ...]) -> str:
    return parts[0] if parts else "__init__"


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    """The package's modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (tuple(name.split(".")[1:]) for name in names if name.startswith("ds_shampoo."))


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef]]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        if isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{m.name}", m) for m in node.body if isinstance(m, ast.FunctionDef))


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_run_one_way(path: Path) -> None:
    own = path.relative_to(PACKAGE).with_suffix("").parts
    if own == ("__init__",) or own[0] == "testing":
        return
    floors = {name: floor for floor, names in enumerate(LAYERS) for name in names}
    assert own[0] in floors, f"'{own[0]}' has no layer: put it into LAYERS"
    for other in imported(path):
        if other[0] != own[0]:
            assert floors[other[0]] > floors[own[0]], f"{'.'.join(own)} imports {'.'.join(other)}"
        elif own[0] == "frameworks" and len(own) > 2 and other[1] in FOLDERS - {own[1]}:
            assert other[1] in FRAMEWORKS.get(own[1], set()), f"{'.'.join(own)} imports {'.'.join(other)}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_files_stay_small(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_many_arguments_have_names(path: Path) -> None:
    for name, node in functions(path):
        positional = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
        assert len(positional) <= MOST_POSITIONAL or name in AS_OTHERS, f"{name}{tuple(positional)}"
