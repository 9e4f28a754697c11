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
        batch_dims: 1 where the merged shape's first dimension numbers independent matrices, of which a block is a part
            of one; else 0.
    """

    parameter: str
    index: int
    starts: tuple[int, ...]
    shape: tuple[int, ...]
    preconditioned: tuple[int, ...]
    origin: tuple[int, ...]
    batch_dims: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def factor_dims(self) -> tuple[int, ...]:
        """The orders of the block's Kronecker factors."""
        return tuple(self.shape[dim] for dim in self.preconditioned)

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Its extent in the matrix that it is a part of: `shape` without batch dimensions."""
        return self.shape[self.batch_dims :]

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
class Parts:
    """How a matrix divides that several were fused into: queries, keys and values, or gate and up projection.

    Attributes:
        dim: the dimension along which they lie one after another, 0 or 1.
        lengths: of all of them along it, in their order.
    """

    dim: int
    lengths: tuple[int, ...]

    def fit(self, dims: Sequence[int]) -> bool:
        """Whether a matrix of these dimensions divides so."""
        return len(dims) == 2 and min(self.lengths) > 0 and sum(self.lengths) == dims[self.dim]

    def boxes(self, dims: Sequence[int]) -> list[Section]:
        """Each part of a matrix of these dimensions as a section of it."""
        found: list[Section] = []
        for start, length in zip(itertools.accumulate(self.lengths, initial=0), self.lengths, strict=False):
            at, shape = [0, 0], list(dims)
            at[self.dim], shape[self.dim] = start, length
            found.append(Section(tuple(at), tuple(shape), tuple(at)))
        return found


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


def matrix_shape(shape: Sequence[int], batch: int) -> tuple[int, ...]:
    """The shape of each of `batch` matrices that lie one after another in a tensor of `shape`.

    They are numbered by leading dimensions, or are runs of rows of the first: (8, 3, 4) and (24, 4) in a batch of 8
    both are matrices (3, 4).
    """
    dims = list(shape)
    while batch > 1:
        common = math.gcd(batch, dims[0])
        batch //= common
        dims[0] //= common
        if dims[0] == 1 and len(dims) > 1:
            del dims[0]
        elif common == 1:
            raise ValueError(f"a tensor of shape {tuple(shape)} does not divide: {batch} matrices are left over")
    return tuple(dims)


def matrix_dims(shape: Sequence[int], batch: int) -> tuple[int, ...]:
    """The dimensions above 1, or 0, of each of the matrices in a tensor; see `matrix_shape`."""
    return tuple(dim for dim in matrix_shape(shape, batch) if dim != 1)


def cut(
    parameter: str,
    shape: Sequence[int],
    *,
    block_size: int,
    max_preconditioner_dim: int | None = None,
    max_factor_ratio: float | None = None,
    merge: bool = True,
    skip_dim: int | None = None,
    sections: Sequence[Section] | None = None,
    batch: int = 1,
    parts: Parts | None = None,
) -> BlockedParameter | None:
    """Cuts a parameter of `shape` into blocks (section 1 of docs/algorithm.md).

    Args:
        max_factor_ratio: where the factor of a block's longest side would have more than so many times the block's
            elements, that side is cut shorter, to so many times the product of the others; at least 1.
        skip_dim: leave this dimension unpreconditioned and uncut, the first (0) or the last (-1): a vocabulary's, of
            one-sided embeddings.
        sections: those of the whole matrix of which `shape` is this rank's slice; blocks are numbered over all of
            it. None where the parameter is one section.
        batch: so many independent matrices lie one after another in the parameter (`matrix_shape`); each is cut by
            itself, and merging and limits are about its own dimensions.
        parts: the matrices that were fused into this one, or into each of the batch; each is cut by itself, and limits
            are about the largest of them. Not together with `sections`.

    Returns:
        None where nothing is left to precondition: fewer than two dimensions above 1, or none within the limits.
    """
    dims = matrix_dims(shape, batch)
    if len(dims) < 2 or 0 in dims:
        return None
    if sections is not None:
        boxes = sections
    elif parts is not None:
        boxes = parts.boxes(dims)
    else:
        dims = merge_small_dims(dims, block_size) if merge else dims
        boxes = [Section((0,) * len(dims), dims, (0,) * len(dims))]
    ends = [box.shape if parts is not None else tuple(map(operator.add, box.origin, box.shape)) for box in boxes]
    extent = [max(each) for each in zip(*ends, strict=True)]
    limit = math.inf if max_preconditioner_dim is None else max_preconditioner_dim
    skipped = None if skip_dim is None else skip_dim % len(dims)
    preconditioned = [i for i, dim in enumerate(extent) if dim <= limit and i != skipped]
    if not preconditioned:
        return None
    sizes = [block_size if i in preconditioned else extent[i] for i in range(len(dims))]
    if max_factor_ratio is not None:
        sizes = _shortened(extent, sizes, max_factor_ratio, preconditioned)
    if batch > 1:
        boxes, sizes, dims = _stacked(boxes, batch), [1, *sizes], (batch, *dims)
        preconditioned = [i + 1 for i in preconditioned]
    found = sorted(piece for box in boxes for piece in _pieces(box, sizes))
    blocks = tuple(
        Block(parameter, index, starts, shape, tuple(preconditioned), origin, int(batch > 1))
        for index, (origin, shape, starts) in enumerate(found)
        if starts is not None
    )
    return BlockedParameter(parameter, dims, blocks)


def _shortened(extent: Sequence[int], sizes: Sequence[int], ratio: float, dims: Sequence[int]) -> list[int]:
    """`sizes` with the longest of `dims` at most `ratio` times as long as the product of the others.

    Judged by whole blocks, not by what is left over at a border, so that all of a dimension is cut alike. A shorter
    dimension is within such a ratio anyhow.
    """
    found = list(sizes)
    whole = [min(dim, size) for dim, size in zip(extent, sizes, strict=True)]
    longest = max(dims, key=lambda i: whole[i])
    found[longest] = min(found[longest], max(1, int(ratio * (math.prod(whole) // whole[longest]))))
    return found


def _stacked(boxes: Sequence[Section], batch: int) -> list[Section]:
    """Sections of one matrix as those of a batch of them."""
    return [
        Section((0, *box.origin), (batch, *box.shape), None if box.starts is None else (0, *box.starts))
        for box in boxes
    ]


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
