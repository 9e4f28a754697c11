"""Cuts a parameter into blocks: small dimensions merged, large ones cut, each block with a logical identity."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangular piece of one logical parameter, as seen before any sharding over data-parallel ranks.

    Attributes:
        parameter: the parameter's name.
        index: the block's number within the parameter, row-major over the pieces.
        starts: where the block begins, per dimension of the parameter's merged shape.
        shape: its extent, per dimension of the merged shape.
        preconditioned: the dimensions that have a Kronecker factor.
        origin: `starts` in the parameter's whole tensor, of which tensor-parallel ranks hold a slice each.
    """

    parameter: str
    index: int
    starts: tuple[int, ...]
    shape: tuple[int, ...]
    preconditioned: tuple[int, ...]
    origin: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def factor_dims(self) -> tuple[int, ...]:
        """The orders of the block's Kronecker factors."""
        return tuple(self.shape[dim] for dim in self.preconditioned)

    def __str__(self) -> str:
        return f"{self.parameter}[{self.index}]"


@dataclass(frozen=True, slots=True)
class Section:
    """A box of a matrix that is cut into blocks by itself: a tensor-parallel rank's keys of one group of heads, say.

    Attributes:
        origin: where it begins in the whole matrix.
        shape: its extent.
        starts: where it begins in this rank's slice of the matrix; None if another rank holds it.
    """

    origin: tuple[int, ...]
    shape: tuple[int, ...]
    starts: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class BlockedParameter:
    """A parameter's merged shape, and the blocks that tile it."""

    parameter: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]


def merge_small_dims(shape: Sequence[int], limit: int) -> tuple[int, ...]:
    """Merges adjacent dimensions, last to first, while their product stays within `limit`.

    Stops at two dimensions, so that a convolution's kernel folds into its fan-in while no matrix ever turns
    into a vector. Dimensions of size 1 must be gone already.
    """
    dims = list(shape)
    at = len(dims) - 2
    while at >= 0 and len(dims) > 2:
        if dims[at] * dims[at + 1] <= limit:
            dims[at : at + 2] = [dims[at] * dims[at + 1]]
        at -= 1
    return tuple(dims)


def cut(
    parameter: str,
    shape: Sequence[int],
    *,
    block_size: int,
    max_preconditioner_dim: int | None = None,
    merge: bool = True,
    skip_first_dim: bool = False,
    sections: Sequence[Section] | None = None,
) -> BlockedParameter | None:
    """Cuts a parameter of `shape` into blocks (section 1 of docs/algorithm.md).

    Args:
        sections: those of the whole matrix of which `shape` is this rank's slice; blocks are numbered over all of
            it. None where the parameter is one section.
        skip_first_dim: leave the first dimension unpreconditioned and uncut (one-sided embeddings).

    Returns:
        None where nothing is left to precondition: fewer than two dimensions above 1, or none within
        `max_preconditioner_dim`.
    """
    dims = tuple(dim for dim in shape if dim != 1)
    if len(dims) < 2 or 0 in dims:
        return None
    if sections is None:
        dims = merge_small_dims(dims, block_size) if merge else dims
        boxes: Sequence[Section] = [Section((0,) * len(dims), dims, (0,) * len(dims))]
    else:
        boxes = sections
    limit = math.inf if max_preconditioner_dim is None else max_preconditioner_dim
    extent = [max(box.origin[i] + box.shape[i] for box in boxes) for i in range(len(dims))]
    preconditioned = tuple(i for i, dim in enumerate(extent) if dim <= limit and not (skip_first_dim and i == 0))
    if not preconditioned:
        return None
    sizes = [block_size if i in preconditioned else extent[i] for i in range(len(dims))]
    found = sorted(piece for box in boxes for piece in _pieces(box, sizes))
    blocks = tuple(
        Block(parameter, index, starts, shape, preconditioned, origin)
        for index, (origin, shape, starts) in enumerate(found)
        if starts is not None
    )
    return BlockedParameter(parameter, dims, blocks)


def _pieces(
    box: Section, sizes: Sequence[int]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...] | None]]:
    """Origin, shape and starts of the pieces of a section, none of them larger than `sizes`."""
    cuts = [range(0, dim, size) for dim, size in zip(box.shape, sizes, strict=True)]
    for at in itertools.product(*cuts):
        shape = tuple(min(size, dim - i) for i, dim, size in zip(at, box.shape, sizes, strict=True))
        yield _shifted(box.origin, at), shape, None if box.starts is None else _shifted(box.starts, at)


def _shifted(place: Sequence[int], by: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(operator.add, place, by))
