"""Keeps the inverse roots of a stack of blocks fresh: jobs, their results, failures, and counts of it all."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ds_shampoo.algorithm.preconditioner import ShampooPreconditioner
from ds_shampoo.algorithm.statistics import bias_correction
from ds_shampoo.config import GroupSettings
from ds_shampoo.host.jobs import RootAnswer, RootJob, Verdict
from ds_shampoo.host.pool import Task
from ds_shampoo.host.schedule import RootSchedule
from ds_shampoo.host.service import RootService
from ds_shampoo.host.transfer import HostCopy

logger = logging.getLogger("ds_shampoo")

# Warnings of one kind after these many occurrences, so that a run of months stays readable.
_WARN_AT = frozenset({1, 10, 100, 1000, 10_000, 100_000})


@dataclass
class RootCounts:
    """What became of the roots so far.

    Attributes:
        updates: roots put in force.
        fallbacks: those of them that a fallback gave.
        skipped: boundaries at which a statistic had moved too little to be solved again.
        rejected: factors that got no root at a boundary although they have statistics.
        setbacks: boundaries at which a block kept its old roots for that reason.
    """

    updates: int = 0
    fallbacks: int = 0
    skipped: int = 0
    rejected: int = 0
    setbacks: int = 0


@dataclass(frozen=True)
class _Pending:
    """One block's jobs under way, a task per factor.

    Attributes:
        begun_at, due_at: the steps of the boundary and of putting the roots in force.
    """

    begun_at: int
    due_at: int
    jobs: list[RootJob]
    tasks: list[Task[RootAnswer]]


@dataclass
class _BlockRoots:
    """The history of one block's roots.

    Attributes:
        rooted: per factor, the statistic of the root in force (CPU), kept for adaptive refresh only.
        solved: per factor, whether a root was ever accepted.
        failures: consecutive boundaries at which a factor was rejected.
        setbacks: all of them.
        rooted_at: the step whose statistics the roots in force belong to; 0 for none.
        order: p of the roots in force; 0 for none.
        pending: the jobs under way, if any.
    """

    rooted: list[Tensor | None]
    solved: list[bool]
    failures: int = 0
    setbacks: int = 0
    rooted_at: int = 0
    order: int = 0
    pending: _Pending | None = field(default=None, repr=False)


class RootKeeper:
    """Begins jobs at each block's boundaries, and puts their roots in force when they are due."""

    def __init__(
        self, preconditioner: ShampooPreconditioner, places: Sequence[int], service: RootService, counts: RootCounts
    ) -> None:
        """`places` are the slots' in `stagger`'s order."""
        self._stack, self._places, self._service, self._counts = preconditioner, places, service, counts
        factors = len(preconditioner.factors)
        self._blocks = [_BlockRoots([None] * factors, [False] * factors) for _ in preconditioner.blocks]

    def advance(self, clock: Sequence[int], settings: GroupSettings) -> None:
        """Does what falls on this step, after the statistics took it in.

        A rejected root leaves the old one in force; `max_root_failures` boundaries with a rejection in a row
        take the block back to its grafting step until all its factors have a root again.

        Args:
            clock: every slot's step count; 0 where it has no gradient at this step.

        Raises:
            WorkerError: naming the block, where a job raised.
        """
        schedule, usual = RootSchedule.of(settings), self._service.delay(settings)
        for slot, step in enumerate(clock):
            if step == 0:
                continue
            self._install_due(slot, step, settings)
            place = self._places[slot]
            if schedule.is_boundary(step, place) and self._stack.updates[slot]:
                self._begin(slot, step, schedule.delay(step, place, usual), settings)
                self._install_due(slot, step, settings)

    def prepare(self, clock: Sequence[int], settings: GroupSettings) -> None:
        """Waits."""
        for slot, step in enumerate(clock):
            pending = self._blocks[slot].pending
            if step and pending is not None and step >= pending.due_at:
                for task in pending.tasks:
                    self._service._executor.settle(task)

    def let_go(self) -> None:
        """Drops."""
        for block in self._blocks:
            block.pending = None

    def restart(self, slots: Sequence[int]) -> None:
        """Fresh."""
        for slot in slots:
            factors = len(self._stack.factors)
            self._blocks[slot] = _BlockRoots([None] * factors, [False] * factors)
            for tensor in (*self._stack.factors, *self._stack.roots):
                tensor[slot].zero_()
            self._stack.updates[slot], self._stack.ready[slot] = 0, False

    def age(self, slot: int, step: int) -> int | None:
        """Steps since the statistics that the slot's roots in force belong to; None where there are none."""
        return step - self._blocks[slot].rooted_at if self._stack.ready[slot] else None

    def block_state(self, slot: int) -> dict[str, Any]:
        """What `load_block_state` needs beside the preconditioner's own state; jobs under way are in it."""
        block = self._blocks[slot]
        state: dict[str, Any] = {
            "rooted": [tensor for tensor in block.rooted if tensor is not None],
            "solved": list(block.solved),
            "failures": block.failures,
            "setbacks": block.setbacks,
            "rooted_at": block.rooted_at,
            "order": block.order,
        }
        if block.pending is not None:
            state["pending"] = {
                "begun_at": block.pending.begun_at,
                "due_at": block.pending.due_at,
                "snapshots": [job.snapshot.wait().clone() for job in block.pending.jobs],
                "corrections": [job.correction for job in block.pending.jobs],
            }
        return state

    def load_block_state(self, slot: int, state: Mapping[str, Any], settings: GroupSettings) -> None:
        """Takes back what `block_state` gave; jobs that were under way begin again, and are due when they were.

        Roots of another order, of a job with other settings, are dropped: the block takes its grafting step until
        its next ones are due.
        """
        factors = len(self._stack.factors)
        order = int(state.get("order", 0))
        usable = order in (0, self._order(settings))
        rooted: list[Tensor | None] = [tensor.to("cpu", copy=True) for tensor in state["rooted"]]
        if len(rooted) != factors or not usable:
            rooted = [None] * factors
        block = self._blocks[slot] = _BlockRoots(
            rooted,
            [bool(solved) and usable for solved in state["solved"]],
            int(state["failures"]),
            int(state["setbacks"]),
            int(state["rooted_at"]) if usable else 0,
            order if usable else 0,
        )
        self._stack.ready[slot] &= usable
        pending = state.get("pending")
        if pending is not None:
            snapshots = [self._service.transfers.snapshot(tensor) for tensor in pending["snapshots"]]
            begun_at, due_at = int(pending["begun_at"]), int(pending["due_at"])
            jobs = self._jobs(block, snapshots, [float(c) for c in pending["corrections"]], settings)
            block.pending = self._submit(slot, begun_at, due_at, jobs)

    def _order(self, settings: GroupSettings) -> int:
        return settings.inverse_exponent_override or self._stack.root_order

    def _begin(self, slot: int, step: int, delay: int, settings: GroupSettings) -> None:
        stack, block = self._stack, self._blocks[slot]
        correction = bias_correction(settings.statistics_beta, stack.updates[slot])
        snapshots = [self._service.transfers.snapshot(factor[slot]) for factor in stack.factors]
        jobs = self._jobs(block, snapshots, [correction] * len(snapshots), settings)
        block.pending = self._submit(slot, step, step + delay, jobs)

    def _jobs(
        self, block: _BlockRoots, snapshots: Sequence[HostCopy], corrections: Sequence[float], settings: GroupSettings
    ) -> list[RootJob]:
        p = self._order(settings)
        threshold = settings.root_refresh_threshold
        return [
            RootJob(
                snapshot,
                root.shape[-1],
                correction,
                p,
                settings.matrix_epsilon,
                settings.root_method,
                root.dtype,
                threshold,
                former if threshold > 0 else None,
            )
            for root, snapshot, correction, former in zip(
                self._stack.roots, snapshots, corrections, block.rooted, strict=True
            )
        ]

    def _submit(self, slot: int, begun_at: int, due_at: int, jobs: list[RootJob]) -> _Pending:
        label = f"block {self._stack.blocks[slot]}"
        tasks = [self._service.submit(label, job, due_at - begun_at) for job in jobs]
        return _Pending(begun_at, due_at, jobs, tasks)

    def _install_due(self, slot: int, step: int, settings: GroupSettings) -> None:
        block, pending = self._blocks[slot], self._blocks[slot].pending
        if pending is None or step < pending.due_at:
            return
        answers = [
            self._service.collect(task, job.snapshot) for task, job in zip(pending.tasks, pending.jobs, strict=True)
        ]
        block.pending = None
        block.order = pending.jobs[0].p
        reasons = []
        for factor, answer in enumerate(answers):
            self._install(slot, factor, answer)
            if answer.verdict is Verdict.REJECTED:
                reasons.append(answer.method)
        self._judge(slot, pending.begun_at, reasons, settings)

    def _install(self, slot: int, factor: int, answer: RootAnswer) -> None:
        block, counts, target = self._blocks[slot], self._counts, self._stack.roots[factor][slot]
        if answer.verdict is Verdict.SKIPPED:
            target.mul_(answer.scale)
            block.rooted[factor] = answer.statistic
            counts.skipped += 1
        elif answer.root is not None:
            self._service.transfers.install(answer.root, target)
            block.rooted[factor] = answer.statistic
            block.solved[factor] = True
            counts.updates += 1
            if answer.verdict is Verdict.FALLBACK:
                counts.fallbacks += 1
                if counts.fallbacks in _WARN_AT:
                    logger.warning(
                        "block %s: the root came from a fallback (%s); %d so far",
                        self._stack.blocks[slot], answer.method, counts.fallbacks,
                    )  # fmt: skip
        elif answer.verdict is Verdict.REJECTED:
            counts.rejected += 1

    def _judge(self, slot: int, begun_at: int, reasons: Sequence[str], settings: GroupSettings) -> None:
        """Decides, from the reasons why factors got no root, whether the block is preconditioned."""
        block, stack, name = self._blocks[slot], self._stack, self._stack.blocks[slot]
        if reasons:
            block.failures += 1
            block.setbacks += 1
            self._counts.setbacks += 1
            if self._counts.setbacks in _WARN_AT:
                logger.warning(
                    "block %s: a root was rejected (%s) and the old one stays in force; number %d of this block, "
                    "%d of this rank's blocks in all",
                    name, reasons[0], block.setbacks, self._counts.setbacks,
                )  # fmt: skip
            if block.failures == settings.max_root_failures:
                stack.ready[slot] = False
                logger.warning(
                    "block %s got no root at %d boundaries in a row and takes its grafting step from now on",
                    name, block.failures,
                )  # fmt: skip
            return
        if block.failures >= settings.max_root_failures:
            logger.warning("block %s has a root again and is preconditioned again", name)
        block.failures = 0
        stack.ready[slot] = all(block.solved)
        if stack.ready[slot]:
            block.rooted_at = begun_at
