"""Symmetric matrices of which only the lower triangle is kept: panels of columns, each from its diagonal down."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

# How a matrix is cut is part of the format of checkpoints: who changes it changes `checkpoint.files.FORMAT`.
# Narrower panels would come closer to half of the matrix, but their products no longer use a processor well.
_NARROWEST = 128
# And more of them would be more kernels than what they save is worth: with eight, 9/16 of a matrix are kept.
_MOST = 8


@dataclass(frozen=True, slots=True)
class Panel:
    """The columns from `start` on, `width` of them, in the rows from `start` on.

    Attributes:
        offset: where its elements begin in the packed matrix; they lie row by row.
    """

    start: int
    width: int
    offset: int


@functools.cache
def panels(order: int) -> tuple[Panel, ...]:
    """How a matrix of this order is cut."""
    width = max(_NARROWEST, -(-order // _MOST))
    found: list[Panel] = []
    offset = 0
    for start in range(0, order, width):
        panel = Panel(start, min(width, order - start), offset)
        offset += (order - start) * panel.width
        found.append(panel)
    return tuple(found)


def packed_numel(order: int) -> int:
    """Elements of one packed matrix: all of it up to order 128, 9/16 of it from 1024 on."""
    last = panels(order)[-1]
    return last.offset + last.width**2


def views(packed: Tensor, order: int) -> Iterator[tuple[Panel, Tensor]]:
    """Every panel of packed matrices [.., packed_numel(order)], as a view [.., order - start, width]."""
    for panel in panels(order):
        rows = order - panel.start
        flat = packed[..., panel.offset : panel.offset + rows * panel.width]
        yield panel, flat.view(*flat.shape[:-1], rows, panel.width)


def unpack(packed: Tensor, order: int) -> Tensor:
    """The full symmetric matrices [.., order, order], exactly symmetric, of packed ones [.., packed_numel(order)].

    Of the square at the top of each panel the lower triangle counts.
    """
    full = packed.new_empty(*packed.shape[:-1], order, order)
    for panel, part in views(packed, order):
        start, end = panel.start, panel.start + panel.width
        square, below = part[..., : panel.width, :], part[..., panel.width :, :]
        full[..., start:end, start:end] = square.tril() + square.tril(-1).mT
        full[..., end:, start:end] = below
        full[..., start:end, end:] = below.mT
    return full
