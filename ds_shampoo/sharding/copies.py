"""Copies between boxes of many tensors: what a shard's buffers, the stacks of blocks and messages have in common."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_shampoo.kernels.boxes import Flat, Table, Tile, box_kernels


@dataclass(frozen=True, slots=True)
class View:
    """A strided view into one of several contiguous tensors; the last dimension's elements are neighbours."""

    tensor: int
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, tensors: Sequence[Tensor | None]) -> Tensor:
        base = tensors[self.tensor]
        assert base is not None, "a tensor that is not there has no views"
        return base.as_strided(self.sizes, self.strides, base.storage_offset() + self.offset)


@dataclass(frozen=True, slots=True)
class Copy:
    """Elements on their way from one view to another of the same sizes, and the segment that they belong to."""

    source: View
    target: View
    segment: int


class Copies:
    """Copies that are made together, step after step: in one launch where `box_kernels` can."""

    def __init__(self, copies: Sequence[Copy], device: torch.device) -> None:
        self._copies, self._kernels = tuple(copies), box_kernels(device)
        self._table = table_of(self._copies, device) if self._kernels is not None else None

    def run(
        self, sources: Sequence[Tensor | None], targets: Sequence[Tensor | None], flags: Tensor | None = None
    ) -> None:
        """Makes those whose both tensors are there.

        Args:
            sources, targets: contiguous, those of a list of one dtype; rounded to the targets'.
            flags: [segments] on the device; where a segment's is 0 its targets stay as they are.
        """
        if not self._copies:
            return
        if self._kernels is None or self._table is None:
            self._one_by_one(sources, targets, flags)
        else:
            self._kernels.copy(self._table, sources, targets, flags=flags)

    def _one_by_one(
        self, sources: Sequence[Tensor | None], targets: Sequence[Tensor | None], flags: Tensor | None
    ) -> None:
        seen = flags.tolist() if flags is not None and flags.device.type == "cpu" else None
        for copy in self._copies:
            if sources[copy.source.tensor] is None or targets[copy.target.tensor] is None:
                continue
            if seen is not None and not seen[copy.segment] > 0:
                continue
            values, target = copy.source.of(sources), copy.target.of(targets)
            if flags is not None and seen is None:  # the host does not know
                values = torch.where(flags[copy.segment] > 0, values.to(target.dtype), target)
            target.copy_(values)


def table_of(copies: Iterable[Copy], device: torch.device) -> Table:
    """What a kernel goes by."""
    return Table((tile for copy in copies for tile in tiles(copy)), device)


def tiles(copy: Copy) -> Iterator[Tile]:
    """A copy as boxes of two dimensions; neighbours that lie one after another at both ends are one dimension."""
    dims: list[tuple[int, int, int]] = []
    for size, source, target in zip(copy.source.sizes, copy.source.strides, copy.target.strides, strict=True):
        if size == 1:
            continue
        if dims and dims[-1][1:] == (size * source, size * target):
            size *= dims.pop()[0]
        dims.append((size, source, target))
    columns = dims.pop()[0] if dims and dims[-1][1:] == (1, 1) else 1
    rows, *strides = dims.pop() if dims else (1, 0, 0)
    for at in itertools.product(*(range(size) for size, _, _ in dims)):
        first, second = (
            Flat(view.tensor, view.offset + sum(i * dim[end] for i, dim in zip(at, dims, strict=True)), stride)
            for end, view, stride in ((1, copy.source, strides[0]), (2, copy.target, strides[1]))
        )
        yield Tile(first, second, rows, columns, copy.segment)
