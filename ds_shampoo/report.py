"""The table shown at start: what is preconditioned, by which blocks, on which ranks, and what is not and why."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from ds_shampoo.sharding.table import BlockTable

_WIDTH = 140


@dataclass
class _Row:
    """Parameters that differ in their layer's number only, taken together."""

    shape: tuple[int, ...]
    reason: str
    parameters: int = 0
    blocks: Counter[tuple[int, ...]] = field(default_factory=Counter)
    owners: Counter[int] = field(default_factory=Counter)
    bytes: int = 0


def render(tables: Sequence[BlockTable]) -> str:
    """The table as text, the same on every rank."""
    rows = _rows(tables)
    table = Table(title="Shampoo", title_justify="left", caption=_summary(rows), caption_justify="left")
    for column in ("parameter", "shape", "blocks", "blocks by owner rank", "factors + roots"):
        table.add_column(column, overflow="fold")
    for name, row in rows.items():
        label = f"{name} ({row.parameters})" if row.parameters > 1 else name
        blocks = ", ".join(f"{count} of {_by(shape)}" for shape, count in row.blocks.items())
        owners = ", ".join(f"{rank}: {row.owners[rank]}" for rank in sorted(row.owners))
        table.add_row(
            label,
            _by(row.shape),
            blocks or f"none: {row.reason}",
            owners,
            human_bytes(row.bytes) if row.bytes else "",
        )
    console = Console(width=_WIDTH, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def human_bytes(count: int) -> str:
    """A byte count with a binary unit and one decimal."""
    power = min(int(math.log2(count)) // 10, 4) if count else 0
    return f"{count / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


def _rows(tables: Sequence[BlockTable]) -> dict[str, _Row]:
    rows: dict[str, _Row] = {}
    for block_table in tables:
        owners = dict(zip(block_table.blocks, block_table.owners, strict=True))
        state_bytes = dict(zip(block_table.blocks, block_table.state_bytes, strict=True))
        for name, (blocked, reason) in block_table.blocked.items():
            pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
            shape = block_table.shapes[name]
            if pattern in rows and (rows[pattern].shape, rows[pattern].reason) != (shape, reason):
                pattern = name
            row = rows.setdefault(pattern, _Row(shape, reason))
            row.parameters += 1
            for block in blocked.blocks if blocked is not None else ():
                row.blocks[block.matrix_shape] += 1
                row.owners[owners[block]] += 1
                row.bytes += state_bytes[block]
    return rows


def _summary(rows: dict[str, _Row]) -> str:
    taken = [row for row in rows.values() if row.blocks]
    left = [row for row in rows.values() if not row.blocks]
    elements = sum(math.prod(row.shape) * row.parameters for row in taken)
    others = sum(math.prod(row.shape) * row.parameters for row in left)
    return (
        f"preconditioned: {sum(row.parameters for row in taken)} parameters, {elements:,} elements, "
        f"{sum(sum(row.blocks.values()) for row in taken)} blocks, {human_bytes(sum(row.bytes for row in taken))} "
        f"over all ranks; by the grafting method alone: {sum(row.parameters for row in left)} parameters, "
        f"{others:,} elements"
    )


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
