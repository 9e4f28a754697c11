"""Fragments: who holds which contiguous run of which parameter, and the boxes that such a run is made of."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ds_shampoo.algorithm.blocks import Block


@dataclass(frozen=True, slots=True)
class Fragment:
    """A contiguous run of one parameter's elements, in row-major order, that one rank holds.

    Attributes:
        parameter: the parameter's name.
        start: the run's first element within the parameter.
        numel: its length.
        rank: the holder, as a rank of the data-parallel group.
        buffer: which of the holder's buffers it lies in.
        offset: where it begins there.
    """

    parameter: str
    start: int
    numel: int
    rank: int
    buffer: int
    offset: int


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned part of a tensor: where it starts and how far it reaches, per dimension."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    def intersect(self, other: Box) -> Box | None:
        """The common part of two boxes, or None."""
        starts = tuple(map(max, self.starts, other.starts))
        stops = tuple(
            min(a + n, b + m) for a, n, b, m in zip(self.starts, self.sizes, other.starts, other.sizes, strict=True)
        )
        if any(stop <= start for start, stop in zip(starts, stops, strict=True)):
            return None
        return Box(starts, tuple(stop - start for start, stop in zip(starts, stops, strict=True)))


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of one block that one fragment holds, and where its elements lie in the holder's buffer.

    Attributes:
        block: the block's ordinal in the group.
        rank, buffer: who holds it and in which buffer.
        offset, strides: the place of its elements in that buffer, in elements.
        box: the part of the block, in the block's own coordinates.
    """

    block: int
    rank: int
    buffer: int
    offset: int
    strides: tuple[int, ...]
    box: Box


def split_run(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Splits the elements [start, stop) of a row-major tensor into boxes: at most 2k - 1 for k dimensions."""
    if start >= stop:
        return
    if len(shape) == 1:
        yield Box((start,), (stop - start,))
        return
    inner = math.prod(shape[1:])
    (first, head), (last, tail) = divmod(start, inner), divmod(stop, inner)
    if first == last:
        yield from _under(first, split_run(shape[1:], head, tail))
        return
    if head:
        yield from _under(first, split_run(shape[1:], head, inner))
        first += 1
    if first < last:
        yield Box((first,) + (0,) * (len(shape) - 1), (last - first, *shape[1:]))
    if tail:
        yield from _under(last, split_run(shape[1:], 0, tail))


def pieces_of(fragment: Fragment, shape: Sequence[int], blocks: Sequence[tuple[int, Block]]) -> Iterator[Piece]:
    """The pieces of a parameter's blocks that a fragment of it holds.

    Args:
        shape: the parameter's merged shape.
        blocks: the parameter's blocks with their ordinals in the group.
    """
    strides = row_major(shape)
    for run in split_run(shape, fragment.start, fragment.start + fragment.numel):
        for ordinal, block in blocks:
            box = run.intersect(Box(block.starts, block.shape))
            if box is not None:
                first = sum(at * stride for at, stride in zip(box.starts, strides, strict=True))
                inside = tuple(at - start for at, start in zip(box.starts, block.starts, strict=True))
                yield Piece(
                    ordinal,
                    fragment.rank,
                    fragment.buffer,
                    fragment.offset + first - fragment.start,
                    strides,
                    Box(inside, box.sizes),
                )


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(itertools.accumulate(reversed(shape[1:]), operator.mul, initial=1))[::-1]


def _under(index: int, boxes: Iterator[Box]) -> Iterator[Box]:
    return (Box((index, *box.starts), (1, *box.sizes)) for box in boxes)
