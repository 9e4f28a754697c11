"""One param group at work: its blocks, their owners, and the step that joins elementwise state and blocks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ds_shampoo.algorithm import cost, grafting
from ds_shampoo.algorithm.blocks import Block, BlockedParameter, cut
from ds_shampoo.algorithm.preconditioner import ShampooPreconditioner
from ds_shampoo.algorithm.selection import Role
from ds_shampoo.config import GroupSettings
from ds_shampoo.elementwise import TensorStep
from ds_shampoo.host.roots import RootCounts, RootKeeper
from ds_shampoo.host.schedule import RootSchedule, stagger
from ds_shampoo.host.service import RootService
from ds_shampoo.sharding.exchange import ExchangePlan, StackPlace
from ds_shampoo.sharding.fragments import Piece, pieces_of
from ds_shampoo.sharding.norms import PieceNorms, SegmentScaler
from ds_shampoo.sharding.ownership import assign, fingerprint
from ds_shampoo.sharding.partition import LogicalParameter, Partition
from ds_shampoo.stopwatch import Stopwatch

_EXCHANGE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ShardedGroup:
    """A param group, the blocks of it that this rank owns, and how both meet.

    Attributes:
        shapes: by name, each parameter's full shape.
        blocked: by name, each parameter's blocks, or None with the reason why it has none.
        blocks: all blocks in an order that all ranks share; a block's ordinal is its place here.
        owners: by ordinal, the rank that keeps the block.
        stacks: this rank's blocks, stacked by shape.
        counts: what became of their roots.
        exchange_bytes: what this rank sent in the last step.
        last_step: the step count of the group's parameters; the largest where they differ.
    """

    def __init__(
        self,
        parameters: Sequence[LogicalParameter],
        partition: Partition,
        settings: GroupSettings,
        exchange_dtype: str,
        device: torch.device,
        loads: list[float],
        service: RootService,
        stopwatch: Stopwatch,
        first_place: int,
    ) -> None:
        """
        Args:
            device: where blocks are kept and preconditioned; shards may lie on the host (ZeRO-Offload).
            loads: what each rank carries from other groups already; this group's share is added to it.
            first_place: how many blocks other groups have, for their boundaries to stand beside this one's.
        """
        self.partition, self._device = partition, device
        self._service, self._stopwatch = service, stopwatch
        self.shapes = {parameter.name: parameter.shape for parameter in parameters}
        placed = {fragment.parameter for fragment in partition.fragments}
        self.blocked = {
            parameter.name: block_parameter(parameter, settings) if parameter.name in placed else (None, "not trained")
            for parameter in parameters
        }
        self.blocks = [b for blocked, _ in self.blocked.values() if blocked is not None for b in blocked.blocks]
        pieces = self._pieces()
        costs = [cost.step_flops(b, settings.statistics_interval, settings.root_interval) for b in self.blocks]
        self.owners = assign(costs, _homes(len(self.blocks), pieces, partition.world_size), loads)
        for owner, load in zip(self.owners, costs, strict=True):
            loads[owner] += load
        self.counts = RootCounts()
        self._stack_owned(stagger(self.blocks, first_place))
        self.plan = ExchangePlan(
            self.blocks,
            pieces,
            self.owners,
            self._places,
            partition,
            device,
            _EXCHANGE_DTYPES[exchange_dtype],
        )
        self._norms = PieceNorms(self.plan.sources, len(self.blocks), device)
        self._scaler: SegmentScaler | None = None
        if grafting.is_normalized(settings.grafting):
            whole = [fragment for fragment in partition.fragments if self.blocked[fragment.parameter][0] is None]
            self._scaler = SegmentScaler(self.blocks, pieces, self.owners, whole, partition, device)
        self._buffers = {f.parameter: f.buffer for f in partition.fragments if f.rank == partition.rank}
        self.exchange_bytes = 0
        self.last_step = 0

    @property
    def fingerprint(self) -> int:
        """Equal on all ranks that made the same table of fragments, blocks and owners."""
        return fingerprint([self.partition.fragments, self.blocks, self.owners])

    def step(self, held: Sequence[Tensor], states: Sequence[dict[str, Any]], settings: GroupSettings) -> None:
        """One step of docs/algorithm.md.

        Args:
            held: the tensors that stand in the group now: whole parameters, or one flat fp32 shard.
            states: their elementwise state (`new_state`), updated in place.
        """
        tensors: list[TensorStep | None] = []
        for param, state in zip(held, states, strict=True):
            grad = param.grad
            if grad is None and self.plan.moves and param.requires_grad:  # others wait for this rank's pieces
                grad = torch.zeros_like(param)
            tensors.append(None if grad is None else TensorStep(param, grad, state, settings))
        present = [tensor for tensor in tensors if tensor is not None]
        if not present:
            return
        self.last_step = max(tensor.step for tensor in present)
        with self._stopwatch.phase("elementwise"):
            self._filter_and_graft(tensors)
        if self.blocks:
            self._precondition(tensors, settings)
        with self._stopwatch.phase("elementwise"):
            for tensor in present:
                tensor.finish()

    def slots(self) -> list[tuple[Block, ShampooPreconditioner, RootKeeper, int]]:
        """Every owned block with the stack, the root keeper and the slot that hold its state."""
        return [
            (block, stack, keeper, slot)
            for stack, keeper in zip(self.stacks, self._keepers, strict=True)
            for slot, block in enumerate(stack.blocks)
        ]

    def _filter_and_graft(self, tensors: Sequence[TensorStep | None]) -> None:
        if self._scaler is None:
            for tensor in tensors:
                if tensor is not None:
                    tensor.filter_and_graft()
            return
        for tensor in tensors:
            if tensor is not None:
                tensor.filter()
        grads = self._scaler.normalized(self._staged(tensors, "grad"))
        vectors = self._scaler.normalized(self._staged(tensors, "vector"))
        for stepping, unit_grad, unit_vector in zip(tensors, grads, vectors, strict=True):
            if stepping is not None and unit_grad is not None and unit_vector is not None:
                stepping.graft(unit_grad.to(stepping.grad.device), unit_vector.to(stepping.grad.device))

    def _precondition(self, tensors: Sequence[TensorStep | None], settings: GroupSettings) -> None:
        """Statistics, then roots that are begun or due, then the directions of the blocks whose roots are in force."""
        schedule = RootSchedule.of(settings)
        steps = {tensor.step for tensor in tensors if tensor is not None}
        gathered, scratch = self._workspace()
        self.exchange_bytes = 0
        if any(schedule.statistics_due(step) for step in steps):
            self._gather(tensors, "grad", gathered)
        for stack, keeper, grads in zip(self.stacks, self._keepers, gathered, strict=True):
            clock = [self._step_of(block, tensors) for block in stack.blocks]
            due = [slot for slot, step in enumerate(clock) if schedule.statistics_due(step)]
            with self._stopwatch.phase("statistics"):
                stack.update(grads, due, settings.statistics_beta)
            keeper.advance(clock, settings)
        if any(schedule.preconditions(step) for step in steps):
            self._gather(tensors, "vector", gathered)
            updates = self._staged(tensors, "update")
            self._write_directions(gathered, scratch, updates, settings)
            with self._stopwatch.phase("exchange"):
                _unstage(updates, tensors)

    def _staged(
        self, tensors: Sequence[TensorStep | None], name: Literal["grad", "vector", "update"]
    ) -> list[Tensor | None]:
        """A vector of every tensor, on the device of the blocks; whole, since many small copies would be slow."""
        return [None if tensor is None else self._stage(getattr(tensor, name)) for tensor in tensors]

    def _stage(self, vector: Tensor) -> Tensor:
        return vector if vector.device == self._device else vector.to(self._device, non_blocking=True)

    def _gather(
        self, tensors: Sequence[TensorStep | None], name: Literal["grad", "vector"], stacks: Sequence[Tensor]
    ) -> None:
        with self._stopwatch.phase("exchange"):
            self.plan.gather(self._staged(tensors, name), stacks)
        self.exchange_bytes += self.plan.gather_bytes

    def _write_directions(
        self,
        vectors: Sequence[Tensor],
        scratch: Sequence[Tensor],
        updates: Sequence[Tensor | None],
        settings: GroupSettings,
    ) -> None:
        """Overwrites the grafting steps of ready blocks by directions of the same norm."""
        with self._stopwatch.phase("exchange"):
            squares, flags = self._shared_norms(updates)
        with self._stopwatch.phase("precondition"):
            directions = [
                _rescaled(
                    stack.apply(vector, spare) if any(stack.ready) else vector.zero_(),
                    squares[rows] if settings.grafting != "none" else None,
                )
                for stack, rows, vector, spare in zip(self.stacks, self._rows, vectors, scratch, strict=True)
            ]
        ready = {
            ordinal: stack.ready[slot]
            for stack, ordinals in zip(self.stacks, self._ordinals, strict=True)
            for slot, ordinal in enumerate(ordinals)
        }
        with self._stopwatch.phase("exchange"):
            self.plan.scatter(directions, updates, ready, flags)
        self.exchange_bytes += self.plan.scatter_bytes

    def _shared_norms(self, updates: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """By ordinal: the squared norm of each block's grafting step, and above 0 where its owner is ready."""
        squares = self._norms.squares(updates)
        if not self.plan.moves:
            return squares, None
        flags = torch.zeros_like(squares)
        for stack, rows in zip(self.stacks, self._rows, strict=True):
            flags[rows] = torch.tensor(stack.ready, dtype=flags.dtype).to(self._device, non_blocking=True)
        shared = torch.stack([squares, flags])
        dist.all_reduce(shared, group=self.partition.process_group)
        return shared[0], shared[1]

    def _step_of(self, block: Block, tensors: Sequence[TensorStep | None]) -> int:
        """The step count of a block's parameter; 0 where it has no gradient at this step.

        A rank may own a block of which it holds nothing: all of a flat group's shards count alike.
        """
        tensor = tensors[self._buffers.get(block.parameter, 0)]
        return tensor.step if tensor is not None else 0

    def _pieces(self) -> list[Piece]:
        numbered: dict[str, list[tuple[int, Block]]] = defaultdict(list)
        for ordinal, block in enumerate(self.blocks):
            numbered[block.parameter].append((ordinal, block))
        pieces: list[Piece] = []
        for fragment in self.partition.fragments:
            blocked = self.blocked[fragment.parameter][0]
            if blocked is not None:
                pieces.extend(pieces_of(fragment, blocked.shape, numbered[fragment.parameter]))
        return pieces

    def _stack_owned(self, places: Sequence[int]) -> None:
        by_shape: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = defaultdict(list)
        for ordinal, (block, owner) in enumerate(zip(self.blocks, self.owners, strict=True)):
            if owner == self.partition.rank:
                by_shape[block.shape, block.preconditioned].append(ordinal)
        self._ordinals = list(by_shape.values())
        self._places = {
            ordinal: StackPlace(stack, slot)
            for stack, ordinals in enumerate(self._ordinals)
            for slot, ordinal in enumerate(ordinals)
        }
        self.stacks = [
            ShampooPreconditioner([self.blocks[ordinal] for ordinal in ordinals], self._device)
            for ordinals in self._ordinals
        ]
        self._keepers = [
            RootKeeper(stack, [places[ordinal] for ordinal in ordinals], self._service, self.counts)
            for stack, ordinals in zip(self.stacks, self._ordinals, strict=True)
        ]
        self._rows = [torch.tensor(ordinals, device=self._device) for ordinals in self._ordinals]
        self._kept: tuple[list[Tensor], list[Tensor]] | None = None

    def _workspace(self) -> tuple[list[Tensor], list[Tensor]]:
        """Two tensors [n, *shape] per stack for the time of a step.

        A CPU keeps them, since fresh memory costs it a page fault every 4 KiB; an accelerator's caching allocator
        gives the same memory out again, and lends it to others meanwhile.
        """
        if self._kept is not None:
            return self._kept
        gathered, scratch = (
            [torch.zeros(len(s.blocks), *s.blocks[0].shape, device=self._device) for s in self.stacks] for _ in range(2)
        )
        if self._device.type == "cpu":
            self._kept = gathered, scratch
        return gathered, scratch


def block_parameter(parameter: LogicalParameter, settings: GroupSettings) -> tuple[BlockedParameter | None, str]:
    """A parameter's blocks, or None and the reason why it isn't preconditioned."""
    vocabulary = parameter.role in (Role.EMBEDDING, Role.HEAD)
    if parameter.excluded:
        return None, "preconditioned: false"
    if vocabulary and settings.embedding == "diagonal":
        return None, f"{parameter.role.value} (embedding: diagonal)"
    blocked = cut(
        parameter.name,
        parameter.shape,
        block_size=settings.block_size,
        max_preconditioner_dim=settings.max_preconditioner_dim,
        merge=settings.merge_small_dims,
        skip_first_dim=vocabulary and settings.embedding == "one_sided",
    )
    if blocked is not None:
        return blocked, ""
    wide = sum(dim > 1 for dim in parameter.shape) >= 2
    return None, "every dim is above max_preconditioner_dim" if wide else "fewer than two dims above 1"


def _rescaled(directions: Tensor, squares: Tensor | None) -> Tensor:
    """Stacked directions [n, *shape], each brought to the norm whose square is given; a zero one stays zero."""
    if squares is None:
        return directions
    norms = torch.linalg.vector_norm(directions.flatten(1), dim=1)
    scale = torch.where(norms > 0, squares.sqrt() / norms, torch.zeros_like(norms))
    return directions.mul_(scale.view(-1, *(1,) * (directions.dim() - 1)))


def _unstage(updates: Sequence[Tensor | None], tensors: Sequence[TensorStep | None]) -> None:
    """Brings updates that were staged elsewhere back to where the elementwise step goes on."""
    for update, tensor in zip(updates, tensors, strict=True):
        if tensor is not None and update is not None and update is not tensor.update:
            tensor.update.copy_(update)


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
