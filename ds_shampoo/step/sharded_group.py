"""A param group, or a part of one, at work: the step that joins elementwise state and the blocks of this rank."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_shampoo.algorithm import grafting
from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.algorithm.length import rescaled, target_squares
from ds_shampoo.algorithm.precision import matmul_precision, of_statistics
from ds_shampoo.algorithm.preconditioners import PRECONDITIONERS
from ds_shampoo.config import DTYPES, GroupSettings, settings_by_role
from ds_shampoo.roots.keeper import RootCounts, RootKeeper
from ds_shampoo.roots.schedule import RootSchedule
from ds_shampoo.roots.service import RootService
from ds_shampoo.sharding.exchange import ExchangePlan, Gathering, StackSlot
from ds_shampoo.sharding.norms import PieceNorms, SegmentScaler
from ds_shampoo.sharding.table import BlockTable
from ds_shampoo.step.elementwise import ElementwiseStep, StepMemory, TensorStep
from ds_shampoo.step.owned_block import OwnedBlock
from ds_shampoo.step.segments import UNKNOWN, runs_by_buffer
from ds_shampoo.step.stopwatch import Stopwatch
from ds_shampoo.step.work import StepWork


class ShardedGroup:
    """What is stepped together, the blocks of it that this rank owns, and how both meet.

    A step is `prepare`, which may wait and fail and changes nothing that counts, and `step`.

    Attributes:
        table: the blocks and their owners.
        settings: those that the blocks were built with.
        device: where blocks are kept and preconditioned.
        stacks: this rank's blocks, stacked by shape.
        owned_blocks: each of them, with the stack, the root keeper and the slot that hold its state.
        counts: what became of their roots.
        exchange_bytes: what this rank sent in the last step.
        last_step: the step count of the group's parameters; the largest where they differ.
    """

    def __init__(
        self,
        table: BlockTable,
        settings: GroupSettings,
        device: torch.device,
        *,
        exchange_dtype: str,
        service: RootService,
        stopwatch: Stopwatch,
        memory: StepMemory,
        turns: Mapping[Block, int],
    ) -> None:
        """
        Args:
            device: where blocks are kept and preconditioned; shards may lie on the host (ZeRO-Offload).
            memory: for the vectors of a step; all groups', since they step one after another.
            turns: every block's in the rounds of root boundaries.
        """
        self.table, self.settings, self.device = table, settings, device
        self._stopwatch, self._memory = stopwatch, memory
        partition, blocks, owners = table.partition, table.blocks, table.owners
        self._ordinals = table.owned()
        self._rows = [torch.tensor(ordinals, dtype=torch.int64, device=device) for ordinals in self._ordinals]
        self._own_rows = torch.tensor(list(itertools.chain(*self._ordinals)), dtype=torch.int64, device=device)
        build = PRECONDITIONERS[settings.preconditioner]
        root_dtype, differences = DTYPES[settings.root_dtype], settings.statistics_of == "differences"
        self.stacks = [
            build([blocks[i] for i in ordinals], device, root_dtype, differences) for ordinals in self._ordinals
        ]
        self.counts = RootCounts()
        self._keepers = [
            RootKeeper(stack, [turns[block] for block in stack.blocks], service, self.counts) for stack in self.stacks
        ]
        stacked = {
            ordinal: StackSlot(stack, slot)
            for stack, ordinals in enumerate(self._ordinals)
            for slot, ordinal in enumerate(ordinals)
        }
        self.plan = ExchangePlan(
            blocks,
            table.pieces,
            owners,
            stack_slots=stacked,
            partition=partition,
            device=device,
            dtype=DTYPES[exchange_dtype],
        )
        self._norms = PieceNorms(self.plan.sources, len(blocks), device)
        self._scaler: SegmentScaler | None = None
        if grafting.is_normalized(settings.grafting):
            self._scaler = SegmentScaler(
                blocks, table.pieces, owners, whole=table.whole, partition=partition, device=device
            )
        own = [f for f in partition.fragments if f.rank == partition.rank]
        self._buffers = {f.parameter: f.buffer for f in own}
        self._runs = runs_by_buffer(own, table.roles)
        self.owned_blocks = [
            OwnedBlock(block, stack, keeper, slot)
            for stack, keeper in zip(self.stacks, self._keepers, strict=True)
            for slot, block in enumerate(stack.blocks)
        ]
        self._owned_by_parameter: dict[str, list[OwnedBlock]] = {}
        for owned in self.owned_blocks:
            self._owned_by_parameter.setdefault(owned.block.parameter, []).append(owned)
        self._kept: tuple[list[Tensor], list[Tensor]] | None = None
        self.exchange_bytes = 0
        self.last_step = 0

    def prepare(self, stand_ins: Sequence[Tensor], states: Sequence[dict[str, Any]], settings: GroupSettings) -> None:
        """Waits for what the step to come needs, and fails where that would; to be called again after a failure.

        Raises:
            RuntimeError: for a sparse gradient.
            WorkerError: naming the block, where its root can't be computed.
        """
        for param in stand_ins:
            if param.grad is not None and param.grad.is_sparse:
                raise RuntimeError("Shampoo does not support sparse gradients; build the embedding with sparse=False")
        steps = [self._step_to_come(param, state) for param, state in zip(stand_ins, states, strict=True)]
        if self._waited_for or any(steps):
            for keeper, step_counts in zip(self._keepers, self._step_counts(steps, self.last_step + 1), strict=True):
                keeper.prepare(step_counts, settings)

    def wait_for_roots(self, settings: GroupSettings) -> None:
        """Waits for all that the next step may need.

        Raises:
            WorkerError: naming the block, where its root can't be computed.
        """
        for stack, keeper in zip(self.stacks, self._keepers, strict=True):
            keeper.prepare([self.last_step + 1] * len(stack.blocks), settings)

    def step(
        self,
        stand_ins: Sequence[Tensor],
        states: Sequence[dict[str, Any]],
        settings: GroupSettings,
        *,
        begin: Callable[[], None] = lambda: None,
    ) -> None:
        """One step of docs/algorithm.md, after `prepare`.

        Args:
            stand_ins: the tensors that stand in the group now: whole parameters, or flat fp32 shards; none where other
                ranks hold all of it.
            states: their elementwise state (`new_state`), updated in place.
            begin: called before anything is changed, and after all memory that grows with the model is there.
        """
        self._memory.restart()
        work = self._work_to_do(stand_ins, states, settings)
        if work is None:
            return
        begin()
        self.last_step = work.count(usual=self.last_step + 1)
        self._filter_and_graft(work)
        if work.workspace is not None:
            grads, vectors = self._send_to_owners(work)
            self._update_statistics_and_roots(work, grads)
            if vectors is not None:
                self._write_directions(work, vectors)
        with self._stopwatch.phase("elementwise"):
            work.elementwise.finish()

    def take_over(self, other: ShardedGroup, settings: GroupSettings) -> None:
        """Goes on with the blocks of a group of the same table on another device."""
        vars(self.counts).update(vars(other.counts))
        self.last_step = other.last_step
        if other.device.type != "meta":
            for own, others in zip(self.owned_blocks, other.owned_blocks, strict=True):
                own.load(others.state(), settings)
        other.let_go()

    def let_go(self) -> None:
        """Gives back what jobs under way hold; the blocks are of no more use."""
        for keeper in self._keepers:
            keeper.let_go()

    def restart(self, parameters: Collection[str]) -> None:
        """Has all blocks of these parameters begin anew, without statistics and roots."""
        for stack, keeper in zip(self.stacks, self._keepers, strict=True):
            slots = [slot for slot, block in enumerate(stack.blocks) if block.parameter in parameters]
            if slots:
                keeper.restart(slots)

    @property
    def workspace_bytes(self) -> int:
        """What is kept from step to step beside the state: on a CPU only."""
        return sum(tensor.nbytes for tensors in self._kept or () for tensor in tensors)

    def states_by_name(self, states: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """The elementwise state behind each parameter; a flat shard's is that of all its parameters."""
        if len(states) == 1:
            return {name: states[0] for name, (_, reason) in self.table.blocked.items() if "not trained" not in reason}
        return {name: states[buffer] for name, buffer in self._buffers.items()}

    def owned_blocks_of(self, parameter: str) -> Sequence[OwnedBlock]:
        """Those of one parameter."""
        return self._owned_by_parameter.get(parameter, ())

    def _step_to_come(self, param: Tensor, state: Mapping[str, Any]) -> int:
        """The step count that a tensor will have after this step; 0 where it takes no part in it.

        One that is trained takes part without a gradient too, as if it were zero, where others wait for its pieces.
        """
        takes_part = param.grad is not None or (self._waited_for and param.requires_grad)
        return int(state["step"]) + 1 if takes_part else 0

    @property
    def _waited_for(self) -> bool:
        """Whether others may wait for pieces of what has no gradient here."""
        return self.plan.moves and not self.table.partition.missing_alike

    def _work_to_do(
        self, stand_ins: Sequence[Tensor], states: Sequence[dict[str, Any]], settings: GroupSettings
    ) -> StepWork | None:
        """What the step works on, with all of its memory; None where there is nothing to do."""
        by_role = settings_by_role(settings)
        tensors = [
            TensorStep(
                param,
                param.grad if param.grad is not None else torch.zeros_like(param),
                state,
                settings=settings,
                by_role=by_role,
                memory=self._memory,
                runs=self._runs.get(buffer, UNKNOWN),
            )
            if self._step_to_come(param, state)
            else None
            for buffer, (param, state) in enumerate(zip(stand_ins, states, strict=True))
        ]
        if not self._waited_for and not any(tensors):
            return None
        blank: list[Tensor | None] = [None] * len(stand_ins)
        if self.plan.moves:  # others expect the pieces of what takes no part, and pass them over
            blank = [
                torch.zeros(param.numel(), dtype=torch.float32, device=self.device) if tensor is None else None
                for param, tensor in zip(stand_ins, tensors, strict=True)
            ]
        elementwise = ElementwiseStep([tensor for tensor in tensors if tensor is not None], settings, by_role)
        workspace = self._workspace() if self.table.blocks else None
        return StepWork(settings, tensors, blank, elementwise, workspace, self.device)

    def _filter_and_graft(self, work: StepWork) -> None:
        """Moments, what is to be preconditioned, and the grafting method's own step for it."""
        with self._stopwatch.phase("elementwise"):
            if self._scaler is None:
                work.elementwise.filter_and_graft()
            else:
                work.elementwise.filter()
                grads = self._scaler.normalized(work.staged("grad"))
                vectors = self._scaler.normalized(work.staged("vector"))
                work.elementwise.graft(work.returned(grads), work.returned(vectors))

    def _send_to_owners(self, work: StepWork) -> tuple[Gathering | None, Gathering | None]:
        """Gradients for the statistics and vectors for the directions, on their way to the blocks' owners.

        Both leave at once, so that the second travels while the statistics take in the first.
        """
        schedule, steps = RootSchedule.of(work.settings), work.step_counts() or {self.last_step}
        self.exchange_bytes = 0
        grads, vectors = None, None
        preconditions = any(schedule.preconditions(step) for step in steps)
        if any(schedule.statistics_due(step) for step in steps):
            grads = self._gather(work.staged("grad", waited_for_later=preconditions))
        if preconditions:
            vectors = self._gather(work.staged("vector"))
        return grads, vectors

    def _update_statistics_and_roots(self, work: StepWork, grads: Gathering | None) -> None:
        """Statistics of the blocks whose turn it is, then roots that are begun or due; stack by stack."""
        schedule, gathered = RootSchedule.of(work.settings), work.gathered
        self._arrive(grads, gathered)
        by_stack = self._step_counts([0 if tensor is None else tensor.step for tensor in work.tensors], self.last_step)
        for stack, keeper, stacked, step_counts in zip(self.stacks, self._keepers, gathered, by_stack, strict=True):
            due = [slot for slot, step in enumerate(step_counts) if schedule.statistics_due(step)]
            with self._stopwatch.phase("statistics"), matmul_precision(of_statistics(work.settings.matmul_precision)):
                stack.update(stacked, due, work.settings.statistics_beta)
            with self._stopwatch.phase("roots"):
                keeper.advance(step_counts, work.settings)

    def _write_directions(self, work: StepWork, vectors: Gathering) -> None:
        """Overwrites grafting steps by directions where blocks have one, of the same norm or the one asked for."""
        settings = work.settings
        self._arrive(vectors, work.gathered)
        updates = work.staged("update")
        with self._stopwatch.phase("exchange"):
            squares, directed = self._shared_norms(updates)
        with self._stopwatch.phase("precondition"), matmul_precision(settings.matmul_precision):
            directions = [
                rescaled(
                    stack.apply(vector, spare) if any(stack.directed) else vector.zero_(),
                    target_squares(squares[rows], stack.blocks[0].numel, settings.direction_rms, settings.grafting),
                )
                for stack, rows, vector, spare in zip(self.stacks, self._rows, work.gathered, work.scratch, strict=True)
            ]
        with self._stopwatch.phase("exchange"):
            self.plan.scatter(directions, updates, directed)
            work.unstage(updates)
        self.exchange_bytes += self.plan.scatter_bytes

    def _gather(self, staged: Sequence[Tensor | None]) -> Gathering:
        self.exchange_bytes += self.plan.gather_bytes
        with self._stopwatch.phase("exchange"):
            return self.plan.gather(staged)

    def _arrive(self, gathering: Gathering | None, stacks: Sequence[Tensor]) -> None:
        if gathering is not None:
            with self._stopwatch.phase("exchange"):
                self.plan.finish(gathering, stacks)

    def _shared_norms(self, updates: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """By ordinal: squared norms of the grafting steps, and above 0 where a block has a direction; None for all."""
        squares = self._norms.squares(updates)
        own = [has_one for stack in self.stacks for has_one in stack.directed]
        if not self.plan.moves and all(own):
            return squares, None
        directed = torch.zeros_like(squares)
        directed[self._own_rows] = torch.tensor(own, dtype=directed.dtype, device="cpu").to(
            self.device, non_blocking=True
        )
        if not self.plan.moves:
            return squares, directed
        shared = torch.stack([squares, directed])
        dist.all_reduce(shared, group=self.table.partition.process_group)
        return shared[0], shared[1]

    def _step_counts(self, steps: Sequence[int], usual: int) -> list[list[int]]:
        """By stack, the step count of every block's parameter; 0 where it takes no part in this step.

        A rank may own a block of which it holds nothing: all of a flat group's shards count alike.

        Args:
            steps: by tensor.
            usual: where this rank holds nothing at all.
        """
        by_buffer = steps or [usual]
        return [
            [by_buffer[self._buffers.get(block.parameter, 0) if steps else 0] for block in stack.blocks]
            for stack in self.stacks
        ]

    def _workspace(self) -> tuple[list[Tensor], list[Tensor]]:
        """Two tensors [n, *shape] per stack for the time of a step.

        A CPU keeps them, since fresh memory costs it a page fault every 4 KiB; an accelerator's caching allocator
        gives the same memory out again, and lends it to others meanwhile.
        """
        if self._kept is not None:
            return self._kept
        gathered, scratch = (
            [
                torch.zeros(len(s.blocks), *s.blocks[0].shape, dtype=torch.float32, device=self.device)
                for s in self.stacks
            ]
            for _ in range(2)
        )
        if self.device.type == "cpu":
            self._kept = gathered, scratch
        return gathered, scratch
