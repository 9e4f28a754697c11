"""Boxes of many tensors in one launch: the kernels in Triton's interpreter against torch's views one by one."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_shampoo import Shampoo
from ds_shampoo.kernels import boxes
from ds_shampoo.kernels.boxes import BoxKernels, Flat, Table, Tile, box_kernels
from ds_shampoo.sharding.copies import Copies, Copy, View, tiles
from ds_shampoo.sharding.fragments import row_major

pytest.importorskip("triton")
# Where there is no GPU, tests/conftest.py has Triton interpret its kernels.
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[BoxKernels]:
    with by_triton(monkeypatch):
        found = box_kernels(DEVICE)
        assert found is not None
        yield found


@contextlib.contextmanager
def by_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(boxes, "DEVICES", frozenset({DEVICE.type}))
    boxes._found.cache_clear()
    assert "by Triton" in boxes.describe(DEVICE), boxes.describe(DEVICE)
    yield
    boxes._found.cache_clear()


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


# Sizes of boxes, and of the tensors that they lie in at either end.
PLACES = [
    ((7,), (30,), (9,)),
    ((3, 5), (6, 11), (3, 5)),
    ((4, 6), (4, 6), (9, 6)),
    ((1, 6), (4, 6), (9, 8)),
    ((5, 1), (6, 3), (8, 7)),
    ((2, 3, 4), (5, 7, 4), (2, 3, 4)),
    ((2, 3, 4), (5, 7, 9), (4, 4, 5)),
    ((2, 2, 3, 2), (3, 3, 5, 4), (2, 4, 3, 6)),
    ((1, 1), (3, 3), (2, 2)),
    ((40, 300), (50, 310), (40, 301)),
]


def copies() -> tuple[list[Copy], list[int], list[int]]:
    """A copy for each of the places, spread over two tensors at either end, and how many elements these have."""
    made: list[Copy] = []
    ends = [0, 0], [0, 0]
    for number, (sizes, *within) in enumerate(PLACES):
        views = []
        for end, shape in zip(ends, within, strict=True):
            tensor = (number + len(shape)) % 2
            first = sum(
                stride for size, room, stride in zip(sizes, shape, row_major(shape), strict=True) if room > size
            )
            views.append(View(tensor, end[tensor] + first, sizes, row_major(shape)))
            end[tensor] += torch.Size(shape).numel()
        made.append(Copy(views[0], views[1], number % 4))
    return made, *ends


@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("absent", [None, "source", "target"])
def test_copies_in_one_launch_are_those_one_by_one(
    kernels: BoxKernels, source_dtype: torch.dtype, target_dtype: torch.dtype, flagged: bool, absent: str | None
) -> None:
    made, source_sizes, target_sizes = copies()
    sources: list[Any] = [numbers(size, seed=size).to(source_dtype) for size in source_sizes]
    found: list[Any] = [numbers(size, seed=-size).to(target_dtype) for size in target_sizes]
    expected = [tensor.clone() for tensor in found]
    flags = torch.tensor([1.0, 0.0, 2.0, 1.0], device=DEVICE) if flagged else None
    hidden = {"source": sources, "target": found}.get(absent or "")
    if hidden is not None:
        hidden[1] = None
    if absent == "target":
        expected[1] = None  # type: ignore[call-overload]
    both = Copies(made, DEVICE)
    both.run(sources, found, flags)
    both._one_by_one(sources, expected, flags)
    for a, b in zip(found, expected, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    before = [numbers(size, seed=-size).to(target_dtype) for size in target_sizes]
    moved = [not torch.equal(a, b) for a, b in zip(found, before, strict=True) if a is not None]
    assert any(moved)


def test_tiles_cover_a_box_once_and_are_small() -> None:
    for rows, columns, most in itertools.product((1, 3, 10), (1, 7, 20), (1, 4, 7, 100)):
        whole = Tile(Flat(0, 5, columns + 2), Flat(0, 1, columns), rows, columns, 3)
        parts = list(whole.parts(most))
        assert all(1 <= part.rows * part.columns <= most for part in parts)
        covered = [
            part.source.offset + row * part.source.stride + column
            for part in parts
            for row in range(part.rows)
            for column in range(part.columns)
        ]
        assert sorted(covered) == sorted(5 + r * (columns + 2) + c for r in range(rows) for c in range(columns))


def test_rounding_is_torch_s(kernels: BoxKernels) -> None:
    special = [float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1.00390625, 1.01171875, 3.4e38, 1e-45]
    source = torch.cat([torch.tensor(special, device=DEVICE), numbers(50)])
    target = torch.zeros(source.numel(), dtype=torch.bfloat16, device=DEVICE)
    view = View(0, 0, (source.numel(),), (1,))
    Copies([Copy(view, view, 0)], DEVICE).run([source], [target])
    assert torch.equal(target.nan_to_num(nan=7.0), source.bfloat16().nan_to_num(nan=7.0))


def test_what_lies_one_after_another_at_both_ends_is_one_row() -> None:
    (tile,) = tiles(Copy(View(0, 3, (4, 6), (6, 1)), View(1, 0, (4, 6), (6, 1)), 0))
    assert (tile.rows, tile.columns) == (1, 24)
    (tile,) = tiles(Copy(View(0, 3, (2, 3, 4), (20, 4, 1)), View(1, 0, (2, 3, 4), (12, 4, 1)), 0))
    assert (tile.rows, tile.columns, tile.source.stride, tile.target.stride) == (2, 12, 20, 12)


def test_sums_of_squares_and_scaling_by_segments(kernels: BoxKernels) -> None:
    made, sizes, _ = copies()
    made = sorted((Copy(copy.source, copy.source, copy.segment) for copy in made), key=lambda copy: copy.segment)
    table = Table((tile for copy in made for tile in tiles(copy)), DEVICE)
    starts = torch.tensor([table.segments.index(s) for s in range(4)] + [table.tiles, table.tiles], device=DEVICE)
    for absent in (False, True):
        tensors: list[Tensor | None] = [numbers(size, seed=size) for size in sizes]
        if absent:
            tensors[0] = None
        expected = torch.zeros(5, device=DEVICE)
        for copy in made:
            if tensors[copy.source.tensor] is not None:
                expected[copy.segment] += copy.source.of(tensors).square().sum()
        found = kernels.squares(table, tensors, starts)
        assert torch.allclose(found, expected, rtol=1e-6)
        assert torch.equal(found, kernels.squares(table, tensors, starts)), "in one order"
        scaled = [None if tensor is None else tensor.clone() for tensor in tensors]
        factors = torch.tensor([0.5, -1.0, 3.0, 0.0, 1.0], device=DEVICE)
        kernels.scale(table, scaled, factors)
        for copy in made:
            if tensors[copy.source.tensor] is not None:
                copy.source.of(tensors).mul_(factors[copy.segment])
        assert all(a is None or torch.equal(a, b) for a, b in zip(scaled, tensors, strict=True))  # type: ignore[arg-type]


SHAPES = [(24, 40), (17,), (8, 16), (8, 4, 3, 3), (9, 1, 5)]


def trained(**settings: Any) -> list[Tensor]:
    params = [nn.Parameter(numbers(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    optimizer = Shampoo(params, lr=0.01, block_size=16, root_interval=2, root_overlap=False, **settings)
    for step in range(5):
        for i, param in enumerate(params):
            # One has no gradient for a while.
            param.grad = None if i == 2 and step < 2 else numbers(*param.shape, seed=10 * step + i)
        optimizer.step()
    assert optimizer.metrics()["preconditioned_blocks"] > 0
    return [param.detach() for param in params]


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [
        ({"direction_rms": 0.2, "preconditioner": "shampoo"}, 0.0),
        ({"exchange_dtype": "bfloat16", "direction_rms": 0.2, "preconditioner": "shampoo"}, 0.0),
        ({"start_preconditioning_step": 3, "direction_rms": 0.2, "merge_small_dims": False}, 0.0),
        # Sums of squares are added in another order.
        ({"preconditioner": "shampoo"}, 1e-6),
        ({"preconditioner": "shampoo", "grafting": "rmsprop_normalized"}, 1e-5),
    ],
    ids=str,
)
def test_training_is_the_same(monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], tolerance: float) -> None:
    expected = trained(**settings)
    with by_triton(monkeypatch):
        found = trained(**settings)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def test_without_triton_torch_s_views_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any) -> None:
        raise RuntimeError("they give other numbers than torch")

    monkeypatch.setattr(boxes.BoxKernels, "_try", fails)
    monkeypatch.setattr(boxes, "DEVICES", frozenset({DEVICE.type}))
    boxes._found.cache_clear()
    assert box_kernels(DEVICE) is None
    expected = f"pieces on {DEVICE.type}: one by one (Triton is not used: they give other numbers than torch)"
    assert boxes.describe(DEVICE) == expected
    boxes._found.cache_clear()
