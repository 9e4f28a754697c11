"""The kernels of `boxes`, in Triton: one program for each tile of a table."""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}


@triton.jit
def move(
    table,
    sources,
    targets,
    numbers,
    source_type: tl.constexpr,
    target_type: tl.constexpr,
    how: tl.constexpr,
    chunk: tl.constexpr,
    width: tl.constexpr,
):
    """A target's box takes its source's: as it is, where its segment's number is above 0, or times that number."""
    row = table + tl.program_id(0) * width
    begin = tl.load(sources + tl.load(row))
    end = tl.load(targets + tl.load(row + 3))
    present = (begin != 0) & (end != 0)
    if how == "where":
        present = present & (tl.load(numbers + tl.load(row + 8)) > 0)
    if present:
        source = begin.to(tl.pointer_type(source_type)) + tl.load(row + 1)
        target = end.to(tl.pointer_type(target_type)) + tl.load(row + 4)
        source_stride, target_stride = tl.load(row + 2), tl.load(row + 5)
        columns = tl.load(row + 7)
        count = tl.load(row + 6) * columns
        for first in range(0, count, chunk):
            at = first + tl.arange(0, chunk)
            inside = at < count
            line = at // columns
            column = at - line * columns
            values = tl.load(source + line * source_stride + column, mask=inside)
            if how == "scale":
                values = values * tl.load(numbers + tl.load(row + 8))
            if source_type == tl.float32 and target_type == tl.bfloat16:
                values = _rounded(values)
            tl.store(target + line * target_stride + column, values, mask=inside)


@triton.jit
def squares(table, tensors, partial, source_type: tl.constexpr, chunk: tl.constexpr, width: tl.constexpr):
    """partial[tile] <- the sum of squares of its box; 0 where its tensor is not there, as it was."""
    tile = tl.program_id(0)
    row = table + tile * width
    begin = tl.load(tensors + tl.load(row))
    if begin != 0:
        source = begin.to(tl.pointer_type(source_type)) + tl.load(row + 1)
        stride, columns = tl.load(row + 2), tl.load(row + 7)
        count = tl.load(row + 6) * columns
        total = tl.zeros((chunk,), dtype=tl.float32)
        for first in range(0, count, chunk):
            at = first + tl.arange(0, chunk)
            line = at // columns
            values = tl.load(source + line * stride + at - line * columns, mask=at < count, other=0.0)
            total += values.to(tl.float32) * values.to(tl.float32)
        tl.store(partial + tile, tl.sum(total, axis=0))


@triton.jit
def sum_up(partial, starts, total, chunk: tl.constexpr):
    """total[segment] <- the sum of its tiles', from starts[segment] on up to the next one's."""
    segment = tl.program_id(0)
    begin, end = tl.load(starts + segment), tl.load(starts + segment + 1)
    found = tl.zeros((chunk,), dtype=tl.float32)
    for first in range(begin, end, chunk):
        at = first + tl.arange(0, chunk)
        found += tl.load(partial + at, mask=at < end, other=0.0)
    tl.store(total + segment, tl.sum(found, axis=0))


@triton.jit
def _rounded(values):
    """fp32 to the nearest bfloat16, of two the even one: said here, since Triton's interpreter cuts off instead."""
    bits = values.to(tl.uint32, bitcast=True)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    nearest = tl.where(values == values, nearest, 0x7FC0)
    return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
