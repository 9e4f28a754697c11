"""Every tensor that the package makes says its dtype and its device, so that no default of a job's reaches it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils._device import _device_constructors

import ds_shampoo

PACKAGE = Path(ds_shampoo.__file__).parent

# What torch itself makes on the default device, by name.
CONSTRUCTORS = {function.__name__.removeprefix("fft_") for function in _device_constructors()}
# Makers of modules, whose parameters have the defaults unless both are given.
MODULES = {"Linear", "Embedding", "LayerNorm", "RMSNorm", "Conv2d"}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def tacit(source: str) -> Iterator[str]:
    """The calls in a program that leave a tensor's dtype or device to the job's defaults."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "torch":
            for alias in node.names:
                if alias.name in CONSTRUCTORS:
                    yield f"line {node.lineno}: import torch and write torch.{alias.name}, so that this test sees it"
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        first, _, last = name.rpartition(".")
        given = {keyword.arg for keyword in node.keywords}
        if first.split(".")[0] == "torch" and last in CONSTRUCTORS:
            for needed in ("device", "dtype"):
                if needed not in given:
                    yield f"line {node.lineno}: {name} without {needed}="
        elif name in ("Tensor", "torch.Tensor", "torch.FloatTensor", "torch.DoubleTensor"):
            yield f"line {node.lineno}: {name}(..) takes the defaults"
        elif name == "torch.Generator" and not (node.args or "device" in given):
            yield f"line {node.lineno}: torch.Generator without device="
        elif first in ("nn", "torch.nn") and last in MODULES and not {"device", "dtype"} <= given:
            yield f"line {node.lineno}: {name} without device= and dtype="


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_tensor_says_its_dtype_and_device(path: Path) -> None:
    assert list(tacit(path.read_text())) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.tensor([1], dtype=torch.int64)",
        "torch.zeros(3, device=device)",
        "torch.empty(0)",
        "torch.as_tensor(x, dtype=torch.float32)",
        "torch.fft.fftfreq(3)",
        "torch.Generator()",
        "from torch import zeros",
        "torch.Tensor(3)",
        "nn.Linear(2, 3)",
    ],
)
def test_the_test_sees_what_is_tacit(source: str) -> None:
    assert list(tacit(source))


@pytest.mark.parametrize(
    "source",
    [
        "torch.zeros(3, dtype=torch.float32, device=x.device)",
        "torch.zeros_like(x)",
        "x.new_zeros(3)",
        "torch.from_numpy(array)",
        "torch.Generator('cpu')",
        "self.zeros(3)",
    ],
)
def test_the_test_lets_pass_what_is_said(source: str) -> None:
    assert list(tacit(source)) == []
