"""What is stepped together, as a table: blocks, where their pieces lie, and who keeps each; equal on all ranks."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ds_shampoo.algorithm import cost
from ds_shampoo.algorithm.blocks import Block, BlockedParameter, cut, matrix_shape
from ds_shampoo.algorithm.selection import Role
from ds_shampoo.auxiliary import SettingsRole, auxiliary_role
from ds_shampoo.config import DTYPES, GroupSettings
from ds_shampoo.sharding.fragments import Fragment, Piece, pieces_of
from ds_shampoo.sharding.ownership import assign, fingerprint
from ds_shampoo.sharding.partition import LogicalParameter, Partition


@dataclass(frozen=True)
class BlockTable:
    """What `block_table` finds.

    Attributes:
        partition: where the elements lie.
        shapes: by name, each parameter's full shape.
        batches: by name, how many independent matrices each parameter holds.
        parts: by name, how many matrices are fused in each parameter, or in each of its batch.
        roles: by name of what is trained, whose elementwise settings it has; None for those of hidden matrices.
        blocked: by name, each parameter's blocks, or None with the reason why it has none.
        blocks: all blocks in an order that all ranks share; a block's ordinal is its place here.
        pieces: the parts of the blocks on all ranks.
        owners: by ordinal, the rank that keeps the block.
        state_bytes: by ordinal, of its factors, roots and previous gradient.
    """

    partition: Partition
    shapes: dict[str, tuple[int, ...]]
    batches: dict[str, int]
    parts: dict[str, int]
    roles: dict[str, SettingsRole]
    blocked: dict[str, tuple[BlockedParameter | None, str]]
    blocks: list[Block]
    pieces: list[Piece]
    owners: list[int]
    state_bytes: list[int]

    @property
    def fingerprint(self) -> int:
        """Equal on all ranks that made the same table of fragments, blocks, owners and roles."""
        roles = [self.roles[fragment.parameter] for fragment in self.partition.fragments]
        return fingerprint([self.partition.fragments, self.blocks, self.owners, roles])

    @property
    def whole(self) -> list[Fragment]:
        """The fragments, on all ranks, of the parameters that are not preconditioned, those of a batch one by one."""
        return [
            part
            for fragment in self.partition.fragments
            if self.blocked[fragment.parameter][0] is None
            for part in self._members(fragment)
        ]

    def _members(self, fragment: Fragment) -> Iterator[Fragment]:
        """A fragment's runs of each member of a batch, under a name of its own; of what is no batch, itself."""
        batch = self.batches[fragment.parameter]
        if batch == 1:
            yield fragment
            return
        size, end = math.prod(self.shapes[fragment.parameter]) // batch, fragment.start + fragment.numel
        for number in range(fragment.start // size, (end - 1) // size + 1):
            start, stop = max(fragment.start, number * size), min(end, (number + 1) * size)
            yield replace(
                fragment,
                parameter=f"{fragment.parameter}[{number}]",
                start=start - number * size,
                numel=stop - start,
                offset=fragment.offset + start - fragment.start,
            )

    def owned(self) -> list[list[int]]:
        """This rank's blocks by ordinal, those of one shape together."""
        alike: dict[tuple[tuple[int, ...], tuple[int, ...], int], list[int]] = defaultdict(list)
        for ordinal, (block, owner) in enumerate(zip(self.blocks, self.owners, strict=True)):
            if owner == self.partition.rank:
                alike[block.shape, block.preconditioned, block.batch_dims].append(ordinal)
        return list(alike.values())


def cut_all(parameters: Sequence[LogicalParameter], settings: GroupSettings) -> list[Block]:
    """All blocks of a param group, whether trained or not; a function of names, shapes and settings alone."""
    found = (_blocks_of(parameter, settings)[0] for parameter in parameters)
    return [block for blocked in found if blocked is not None for block in blocked.blocks]


def block_table(
    parameters: Sequence[LogicalParameter], partition: Partition, settings: GroupSettings, loads: list[float]
) -> BlockTable:
    """Cuts parameters that are stepped together into blocks and gives each one an owner.

    Args:
        loads: what each rank carries already; what it gets here is added to it.
    """
    placed = {fragment.parameter for fragment in partition.fragments}
    blocked = {
        parameter.name: _blocks_of(parameter, settings) if parameter.name in placed else (None, _not_trained(parameter))
        for parameter in parameters
    }
    blocks = [block for found, _ in blocked.values() if found is not None for block in found.blocks]
    pieces = _pieces(partition.fragments, blocked, blocks)
    costs = [
        cost.step_flops(block, settings.statistics_interval, settings.root_interval, settings.preconditioner)
        for block in blocks
    ]
    owners = assign(costs, _homes(len(blocks), pieces, partition.world_size), loads)
    for owner, load in zip(owners, costs, strict=True):
        loads[owner] += load
    shapes = {parameter.name: parameter.shape for parameter in parameters}
    batches = {parameter.name: parameter.batch for parameter in parameters}
    root_bytes, differences = DTYPES[settings.root_dtype].itemsize, settings.statistics_of == "differences"
    state_bytes = [cost.state_bytes(block, root_bytes, differences) for block in blocks]
    parts = {parameter.name: len(parameter.parts.lengths) if parameter.parts else 1 for parameter in parameters}
    roles = {
        parameter.name: auxiliary_role(parameter.role, preconditioned=blocked[parameter.name][0] is not None)
        for parameter in parameters
        if parameter.name in placed
    }
    return BlockTable(partition, shapes, batches, parts, roles, blocked, blocks, pieces, owners, state_bytes)


def _blocks_of(parameter: LogicalParameter, settings: GroupSettings) -> tuple[BlockedParameter | None, str]:
    """A parameter's blocks, or None and the reason why it isn't preconditioned."""
    if parameter.unfit:
        return None, _not_trained(parameter)
    vocabulary = parameter.role in (Role.EMBEDDING, Role.HEAD)
    if parameter.excluded:
        return None, "preconditioned: false"
    if vocabulary and settings.embedding == "diagonal":
        return None, f"{parameter.role.value} (embedding: diagonal)"
    if not vocabulary and parameter.role not in (Role.WEIGHT, Role.LORA):
        return None, parameter.role.value
    blocked = cut(
        parameter.name,
        _unfolded(parameter),
        block_size=settings.block_size,
        max_preconditioner_dim=settings.max_preconditioner_dim,
        max_factor_ratio=settings.max_factor_ratio,
        merge=settings.merge_small_dims,
        skip_dim=_spared_dim(parameter, settings),
        sections=parameter.sections,
        batch=parameter.batch,
        parts=parameter.parts,
    )
    if blocked is not None:
        return blocked, ""
    each = matrix_shape(parameter.shape, parameter.batch)
    if sum(dim > 1 for dim in each) < 2:
        return None, "fewer than two dims above 1" + (f" in each of {parameter.batch}" if parameter.batch > 1 else "")
    return None, "every dim is above max_preconditioner_dim"


def _spared_dim(parameter: LogicalParameter, settings: GroupSettings) -> int | None:
    """The dimension that is left out by a parameter's role: the long one of a LoRA factor, or the vocabulary's."""
    if parameter.rank_dim is not None and parameter.role is not Role.WEIGHT:
        return -1 if parameter.rank_dim == 0 else 0
    vocabulary = parameter.role in (Role.EMBEDDING, Role.HEAD)
    return parameter.vocabulary_dim if vocabulary and settings.embedding == "one_sided" else None


def _unfolded(parameter: LogicalParameter) -> tuple[int, ...]:
    """A parameter's shape; a LoRA factor's before a convolution, whose long side is several dimensions, as a matrix."""
    if parameter.role is Role.LORA and parameter.rank_dim == 0 and parameter.batch == 1:
        return parameter.shape[0], math.prod(parameter.shape[1:])
    return parameter.shape


def _not_trained(parameter: LogicalParameter) -> str:
    return f"not trained ({parameter.unfit})" if parameter.unfit else "not trained"


def _pieces(
    fragments: Sequence[Fragment],
    blocked: dict[str, tuple[BlockedParameter | None, str]],
    blocks: Sequence[Block],
) -> list[Piece]:
    numbered: dict[str, list[tuple[int, Block]]] = defaultdict(list)
    for ordinal, block in enumerate(blocks):
        numbered[block.parameter].append((ordinal, block))
    pieces: list[Piece] = []
    for fragment in fragments:
        found = blocked[fragment.parameter][0]
        if found is not None:
            pieces.extend(pieces_of(fragment, found.shape, numbered[fragment.parameter]))
    return pieces


def _homes(blocks: int, pieces: Sequence[Piece], world_size: int) -> list[int | None]:
    """The rank that holds most of each block, the lowest of equals; None where every rank holds all of it."""
    held = [Counter[int]() for _ in range(blocks)]
    for piece in pieces:
        held[piece.block][piece.rank] += piece.box.numel
    return [_home(counter, world_size) for counter in held]


def _home(held: Counter[int], world_size: int) -> int | None:
    if world_size > 1 and len(held) == world_size and len(set(held.values())) == 1:
        return None
    return min(held, key=lambda rank: (-held[rank], rank))
