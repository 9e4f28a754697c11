"""The table shown at start: what is preconditioned, by which blocks, on which ranks, and what is not and why."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from ds_shampoo.algorithm import cost
from ds_shampoo.auxiliary import RoleSettings, SettingsRole
from ds_shampoo.config import GroupSettings, settings_by_role
from ds_shampoo.sharding.table import BlockTable

_WIDTH = 152

# Factors and roots of more than so many times their weights' bytes are warned of, from 1 MiB on. Under the default of
# max_factor_ratio they have up to 33 times, in blocks of 32 x 2.
OUTWEIGHED = 40
_NEGLIGIBLE_BYTES = 2**20
# A matrix as tall as vocabularies make them: so many rows, and so many times its columns.
_TALL_ROWS = 8192
_TALL_RATIO = 8
# The name of a parameter that was passed without one.
UNNAMED = re.compile(r"param_\d+")
_LISTED = 5


@dataclass
class _Row:
    """Parameters that differ in their layer's number only, taken together."""

    shape: tuple[int, ...]
    reason: str
    role: str
    parts: int = 1
    parameters: int = 0
    blocks: Counter[tuple[int, ...]] = field(default_factory=Counter)
    owners: Counter[int] = field(default_factory=Counter)
    bytes: int = 0

    def alike(self, other: _Row) -> bool:
        return all(getattr(self, key) == getattr(other, key) for key in ("shape", "reason", "role", "parts"))


def render(tables: Sequence[BlockTable], settings: Sequence[GroupSettings]) -> str:
    """The table as text, the same on every rank; with the present settings of each table's param group."""
    rows = _rows(tables)
    table = Table(title="Shampoo", title_justify="left", caption=_summary(rows), caption_justify="left")
    for column in ("parameter", "shape", "role", "blocks", "blocks by owner rank", "factors + roots"):
        table.add_column(column, overflow="fold")
    for name, row in rows.items():
        label = f"{name} ({row.parameters})" if row.parameters > 1 else name
        blocks = ", ".join(f"{count} of {_by(shape)}" for shape, count in row.blocks.items())
        owners = ", ".join(f"{rank}: {row.owners[rank]}" for rank in sorted(row.owners))
        table.add_row(
            label,
            _by(row.shape) + (f" ({row.parts} parts)" if row.parts > 1 else ""),
            row.role,
            blocks or f"none: {row.reason}",
            owners,
            human_bytes(row.bytes) if row.bytes else "",
        )
    console = Console(width=_WIDTH, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return f"{capture.get()}{_elementwise_settings(tables, settings)}\n"


def concerns(tables: Sequence[BlockTable], by_name_only: bool) -> list[str]:
    """What deserves a warning at start, the same on every rank.

    Args:
        by_name_only: no model was given, so that embeddings and heads were known by their names alone.
    """
    found = [_outweighed(tables), _untold(tables) if by_name_only else ""]
    return [text for text in found if text]


def _outweighed(tables: Sequence[BlockTable]) -> str:
    """Matrices whose factors and roots outweigh them."""
    rows = {
        name: row
        for name, row in _rows(tables).items()
        if row.bytes > max(OUTWEIGHED * _weight_bytes(row), _NEGLIGIBLE_BYTES)
    }
    if not rows:
        return ""
    state, weights = (
        sum(each) for each in zip(*((row.bytes, _weight_bytes(row)) for row in rows.values()), strict=True)
    )
    return (
        f"factors and roots take {human_bytes(state)} for the {human_bytes(weights)} of {_listed(rows)}: a smaller "
        "max_factor_ratio or block_size cuts such matrices finer, and max_preconditioner_dim leaves their long side out"
    )


def _untold(tables: Sequence[BlockTable]) -> str:
    """Matrices that may be embeddings or heads, where there are no modules to tell."""
    rows = {name: row for name, row in _rows(tables).items() if row.blocks}
    tall = {name: row for name, row in rows.items() if _is_tall(row.shape)}
    if rows and all(UNNAMED.fullmatch(name) for table in tables for name in table.blocked):
        return (
            "Shampoo was given neither a model nor names, and can't tell embeddings and output heads from other "
            "matrices: pass model=..., or (name, parameter) pairs"
        )
    if not tall:
        return ""
    return (
        "without model=... embeddings and output heads are known by their names alone, and what may be one is "
        f"preconditioned as a weight: {_listed(tall)}; pass the model, or say what it is by the setting 'roles'"
    )


def _weight_bytes(row: _Row) -> int:
    return cost.FP32_BYTES * math.prod(row.shape) * row.parameters


def _is_tall(shape: Sequence[int]) -> bool:
    return len(shape) == 2 and shape[0] >= max(_TALL_ROWS, _TALL_RATIO * shape[1])


def _listed(rows: Mapping[str, _Row]) -> str:
    """The first few by name and shape, and how many more there are."""
    shown = [f"{name} ({_by(row.shape)})" for name, row in list(rows.items())[:_LISTED]]
    return ", ".join(shown) + (f" and {len(rows) - _LISTED} more" if len(rows) > _LISTED else "")


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
            role = _called(block_table.roles[name]) if name in block_table.roles else ""
            own = _Row(shape, reason, role, block_table.parts[name])
            if pattern in rows and not rows[pattern].alike(own):
                pattern = name
            row = rows.setdefault(pattern, own)
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


def _elementwise_settings(tables: Sequence[BlockTable], settings: Sequence[GroupSettings]) -> str:
    """A line of what the elementwise step of each role goes by, and for how many parameters."""
    found: Counter[str] = Counter()
    for block_table, own in zip(tables, settings, strict=True):
        by_role = settings_by_role(own)
        said = {
            role: f"{_called(role)} {_said(getattr(own, f'{role}_lr_scale', None), of_role, by_role[None])}"
            for role, of_role in by_role.items()
        }
        found.update(said[role] for role in block_table.roles.values())
    return "by role: " + "; ".join(f"{text} ({count})" for text, count in found.items())


def _said(scale: float | None, own: RoleSettings, groups: RoleSettings) -> str:
    """Rate and decay of a role, and what else differs from its param group's."""
    others = {"betas": ", ".join(f"{beta:g}" for beta in own.betas), "eps": f"{own.eps:g}"}
    differing = [f"{key} {text}" for key, text in others.items() if getattr(own, key) != getattr(groups, key)]
    rate = "lr" if scale in (None, 1) else f"{scale:g} lr"
    return ", ".join([rate, f"decay {own.weight_decay:g}", *differing])


def _called(role: SettingsRole) -> str:
    return role or "weight"


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
