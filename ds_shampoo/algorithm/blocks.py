"""Cuts a parameter into blocks: small dimensions merged, large ones cut, each block with a logical identity."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
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
    """

    parameter: str
    index: int
    starts: tuple[int, ...]
    shape: tuple[int, ...]
    preconditioned: tuple[int, ...]

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
) -> BlockedParameter | None:
    """Cuts a parameter of `shape` into blocks (section 1 of docs/algorithm.md).

    Args:
        skip_first_dim: leave the first dimension unpreconditioned and uncut (one-sided embeddings).

    Returns:
        None where nothing is left to precondition: fewer than two dimensions above 1, or none within
        `max_preconditioner_dim`.
    """
    dims = tuple(dim for dim in shape if dim != 1)
    if len(dims) < 2 or 0 in dims:
        return None
    if merge:
        dims = merge_small_dims(dims, block_size)
    limit = math.inf if max_preconditioner_dim is None else max_preconditioner_dim
    preconditioned = tuple(i for i, dim in enumerate(dims) if dim <= limit and not (skip_first_dim and i == 0))
    if not preconditioned:
        return None
    pieces = [_pieces(dim, block_size if i in preconditioned else dim) for i, dim in enumerate(dims)]
    blocks = tuple(
        Block(parameter, index, tuple(p[0] for p in place), tuple(p[1] for p in place), preconditioned)
        for index, place in enumerate(itertools.product(*pieces))
    )
    return BlockedParameter(parameter, dims, blocks)


def _pieces(dim: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(size, dim - start)) for start in range(0, dim, size)]
