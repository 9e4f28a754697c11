"""Keeps the inverse roots of a stack of blocks fresh: jobs, their results, failures, and counts of it all."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ds_shampoo.algorithm.preconditioners import Preconditioner
from ds_shampoo.algorithm.statistics import bias_correction
from ds_shampoo.config import GroupSettings
from ds_shampoo.roots import history
from ds_shampoo.roots.crew import WARN_AT
from ds_shampoo.roots.history import BlockRoots, Pending, RootCounts
from ds_shampoo.roots.jobs import RootAnswer, RootJob, Verdict
from ds_shampoo.roots.schedule import RootSchedule
from ds_shampoo.roots.service import RootService
from ds_shampoo.roots.tasks import WorkerError
from ds_shampoo.roots.transfer import HostCopy

__all__ = ["RootCounts", "RootKeeper"]

logger = logging.getLogger("ds_shampoo")

_NO_ROOT = (Verdict.REJECTED, Verdict.NOT_FINITE)


class RootKeeper:
    """Begins jobs at each block's boundaries, and puts their roots in force when they are due.

    A step calls `prepare` before it changes anything, and `advance` after the statistics.
    """

    def __init__(
        self, preconditioner: Preconditioner, turns: Sequence[int], service: RootService, counts: RootCounts
    ) -> None:
        """`turns` are the slots', by which their boundaries are spread (`schedule.turns_of`)."""
        self._stack, self._turns, self._service, self._counts = preconditioner, turns, service, counts
        self._blocks = [BlockRoots.fresh(len(preconditioner.factors)) for _ in preconditioner.blocks]

    def prepare(self, step_counts: Sequence[int], settings: GroupSettings) -> None:
        """Does all that may wait or raise, and changes nothing that counts: the roots which are due at this step are
        solved, and the snapshots which it will take have their buffers.

        After any exception, an interrupt's too, it may be called again, for this step or another one.

        Args:
            step_counts: every slot's step count at the step to come; 0 where it has no gradient then.

        Raises:
            WorkerError: naming the block, where a root could not be solved, neither by its thread nor here.
        """
        schedule = RootSchedule.of(settings)
        for slot, step in enumerate(step_counts):
            if step == 0:
                continue
            pending = self._blocks[slot].pending
            due = pending if pending is not None and pending.due(step) else None
            for task in due.tasks if due is not None else ():
                self._service.settle(task)
            if schedule.is_boundary(step, self._turns[slot]):
                self._reserve(slot, due)

    def advance(self, step_counts: Sequence[int], settings: GroupSettings) -> None:
        """Does what falls on this step, after the statistics took it in; waits for nothing that `prepare` settled.

        A rejected root leaves the old one in force; `max_root_failures` boundaries with a rejection in a row
        take the block back to its grafting step until all its factors have a root again. A root that is due in the
        step of its boundary and can't be solved is left to the next step's `prepare`.

        Args:
            step_counts: every slot's step count; 0 where it has no gradient at this step.

        Raises:
            WorkerError: as `prepare` does, where that was not called for this step; nothing is changed then.
        """
        self.prepare(step_counts, settings)
        schedule, usual = RootSchedule.of(settings), self._service.delay(settings)
        for slot, step in enumerate(step_counts):
            if step == 0:
                continue
            self._install_due(slot, step, settings)
            turn = self._turns[slot]
            if schedule.is_boundary(step, turn) and self._stack.updates[slot]:
                self._begin(slot, step, schedule.delay(step, usual), settings)
                if self._settled_at_once(slot, step):
                    self._install_due(slot, step, settings)

    def restart(self, slots: Sequence[int]) -> None:
        """Puts these slots back to where they were built: no statistics, no roots, no jobs under way."""
        self._service.transfers.fence()  # a snapshot may still be read
        for slot in slots:
            self._replace(slot, BlockRoots.fresh(len(self._stack.factors)))
            self._stack.restart(slot)

    def let_go(self) -> None:
        """Gives back what jobs under way hold; the keeper is of no more use."""
        for slot in range(len(self._blocks)):
            self._replace(slot, BlockRoots.fresh(len(self._stack.factors)))

    def age(self, slot: int, step: int) -> int | None:
        """Steps since the statistics that the slot's roots in force belong to; None where there are none."""
        return step - self._blocks[slot].rooted_at if self._stack.ready[slot] else None

    def block_state(self, slot: int) -> dict[str, Any]:
        """What `load_block_state` needs beside the preconditioner's own state; jobs under way are in it.

        Tensors, numbers, lists of these, and under "pending" a dict of the same.
        """
        return self._blocks[slot].state()

    def check_block_state(self, slot: int, state: Mapping[str, Any]) -> None:
        """Whether `load_block_state` would take the state.

        Raises:
            ValueError: naming the block and what is missing or does not fit.
        """
        stack = self._stack
        orders, numels = [root.shape[-1] for root in stack.roots], [factor.shape[-1] for factor in stack.factors]
        fault = history.check(state, orders, numels)
        if fault:
            raise ValueError(f"block {stack.blocks[slot]}: {fault}")

    def load_block_state(self, slot: int, state: Mapping[str, Any], settings: GroupSettings) -> None:
        """Takes back what `block_state` gave; jobs that were under way begin again, and are due when they were.

        Roots of another order, of a job with other settings, are dropped: the block goes on without roots until its
        next ones are due.

        Raises:
            ValueError: as `check_block_state` does; nothing is changed then.
        """
        self.check_block_state(slot, state)
        block = BlockRoots.restored(state, self._root_order(settings))
        saved = state.get("pending")
        snapshots = [self._service.transfers.from_saved(values) for values in saved["snapshots"]] if saved else []
        self._replace(slot, block)
        self._drop_unsolved(slot)
        if saved:
            corrections, updates = [float(c) for c in saved["corrections"]], int(saved.get("updates", 0))
            jobs = self._jobs(block, snapshots, corrections, updates=updates, settings=settings)
            block.pending = self._submit(slot, int(saved["begun_at"]), int(saved["due_at"]), jobs)

    def _drop_unsolved(self, slot: int) -> None:
        """Takes out of force what no accepted root is behind."""
        for factor, solved in enumerate(self._blocks[slot].solved):
            if not solved:
                self._stack.drop_root(slot, factor)

    def _root_order(self, settings: GroupSettings) -> float:
        return settings.inverse_exponent_override or self._stack.root_order

    def _reserve(self, slot: int, due: Pending | None) -> None:
        """Has buffers at hand for the slot's next snapshots, where those of the jobs that are due won't be free."""
        block = self._blocks[slot]
        for number, factor in enumerate(self._stack.factors):
            returned = due is not None and not due.tasks[number].lost
            if not returned and block.reserved[number] is None:
                block.reserved[number] = self._service.transfers.reserve(factor[slot])

    def _begin(self, slot: int, step: int, delay: int, settings: GroupSettings) -> None:
        stack, block = self._stack, self._blocks[slot]
        self._drop_pending(slot)  # one that is not due yet, where settings were changed
        correction = bias_correction(settings.statistics_beta, stack.updates[slot])
        reserved, block.reserved = block.reserved, [None] * len(stack.factors)
        snapshots = [
            self._service.transfers.snapshot(factor[slot], buffer)
            for factor, buffer in zip(stack.factors, reserved, strict=True)
        ]
        jobs = self._jobs(
            block, snapshots, [correction] * len(snapshots), updates=stack.updates[slot], settings=settings
        )
        block.pending = self._submit(slot, step, step + delay, jobs)

    def _jobs(
        self,
        block: BlockRoots,
        snapshots: Sequence[HostCopy],
        corrections: Sequence[float],
        *,
        updates: int,
        settings: GroupSettings,
    ) -> list[RootJob]:
        return [
            RootJob(
                snapshot=snapshot,
                order=root.shape[-1],
                correction=correction,
                updates=updates,
                beta=settings.statistics_beta,
                p=self._root_order(settings),
                epsilon=settings.matrix_epsilon,
                method=settings.root_method,
                root_dtype=root.dtype,
                threshold=settings.root_refresh_threshold,
                former=basis if solved and block.root_order == self._root_order(settings) else None,
            )
            for root, snapshot, correction, basis, solved in zip(
                self._stack.roots, snapshots, corrections, block.bases, block.solved, strict=True
            )
        ]

    def _submit(self, slot: int, begun_at: int, due_at: int, jobs: list[RootJob]) -> Pending:
        label = f"block {self._stack.blocks[slot]}"
        tasks = [self._service.submit(label, job, due_at - begun_at) for job in jobs]
        return Pending(begun_at, due_at, jobs, tasks)

    def _replace(self, slot: int, block: BlockRoots) -> None:
        """Puts another history in a block's place, and gives back what the former one holds."""
        self._drop_pending(slot)
        former, self._blocks[slot] = self._blocks[slot], block
        reserved, former.reserved = former.reserved, []
        for buffer in reserved:
            if buffer is not None:
                self._service.transfers.release(buffer)

    def _drop_pending(self, slot: int) -> None:
        pending, self._blocks[slot].pending = self._blocks[slot].pending, None
        if pending is not None:
            for task, job in zip(pending.tasks, pending.jobs, strict=True):
                self._service.drop(task, job.snapshot)

    def _settled_at_once(self, slot: int, step: int) -> bool:
        """Whether jobs that have just begun are due already, and solved."""
        pending = self._blocks[slot].pending
        if pending is None or not pending.due(step):
            return False
        try:
            for task in pending.tasks:
                self._service.settle(task)
        except WorkerError as error:
            logger.error("%s; its old roots stay in force for a step, and it is tried again then", error)
            return False
        return True

    def _install_due(self, slot: int, step: int, settings: GroupSettings) -> None:
        """Puts settled roots in force: what is given back is taken off before, so that nothing is given back twice."""
        block, pending = self._blocks[slot], self._blocks[slot].pending
        if pending is None or not pending.due(step):
            return
        block.pending = None
        answers = [
            self._service.collect(task, job.snapshot) for task, job in zip(pending.tasks, pending.jobs, strict=True)
        ]
        block.root_order = pending.jobs[0].p
        for factor, answer in enumerate(answers):
            self._install(slot, factor, answer)
        self._judge(slot, pending.begun_at, [a.method for a in answers if a.verdict in _NO_ROOT], settings)
        if any(answer.verdict is Verdict.NOT_FINITE for answer in answers):
            self._restart_statistics(slot)

    def _install(self, slot: int, factor: int, answer: RootAnswer) -> None:
        block, counts, target = self._blocks[slot], self._counts, self._stack.roots[factor][slot]
        if answer.verdict is Verdict.SKIPPED:
            target.mul_(answer.scale)
            block.bases[factor] = answer.basis
            counts.skipped += 1
        elif answer.verdict is Verdict.KEPT:
            counts.skipped += 1
        elif answer.root is not None:
            self._service.transfers.install(answer.root, target)
            block.bases[factor] = answer.basis
            block.solved[factor] = True
            counts.updates += 1
            if answer.verdict is Verdict.FALLBACK:
                counts.fallbacks += 1
                if counts.fallbacks in WARN_AT:
                    logger.warning(
                        "block %s: the root came from a fallback (%s); %d so far",
                        self._stack.blocks[slot], answer.method, counts.fallbacks,
                    )  # fmt: skip
        elif answer.verdict in _NO_ROOT:
            counts.rejected += 1

    def _restart_statistics(self, slot: int) -> None:
        """Has a statistic begin afresh that would never be finite again; the roots in force stay."""
        self._stack.restart_statistics(slot)
        self._blocks[slot].forget_statistics()
        self._counts.restarted += 1
        if self._counts.restarted in WARN_AT:
            logger.warning(
                "block %s: the statistics were not finite (a gradient above 1e19, or one that is not finite) and "
                "begin afresh; number %d of this rank's blocks; exp_avg remembers such a gradient for some hundred "
                "steps, in which the block moves little or askew: clip gradients",
                self._stack.blocks[slot], self._counts.restarted,
            )  # fmt: skip

    def _judge(self, slot: int, begun_at: int, reasons: Sequence[str], settings: GroupSettings) -> None:
        """Decides, from the reasons why factors got no root, whether the block is preconditioned."""
        block, stack, name = self._blocks[slot], self._stack, self._stack.blocks[slot]
        if reasons:
            block.failures += 1
            block.setbacks += 1
            self._counts.setbacks += 1
            if self._counts.setbacks in WARN_AT:
                logger.warning(
                    "block %s: a root was rejected (%s) and the old one stays in force; number %d of this block, "
                    "%d of this rank's blocks in all",
                    name, reasons[0], block.setbacks, self._counts.setbacks,
                )  # fmt: skip
            if block.failures == settings.max_root_failures:
                block.forget_roots()
                self._drop_unsolved(slot)
                instead = "its momentum's own direction" if stack.directed[slot] else "its grafting step"
                logger.warning(
                    "block %s got no root at %d boundaries in a row and goes on without roots: by %s from now on",
                    name, block.failures, instead,
                )  # fmt: skip
            return
        if block.failures >= settings.max_root_failures:
            logger.warning("block %s has a root again and is preconditioned again", name)
        block.failures = 0
        stack.ready[slot] = all(block.solved)
        if stack.ready[slot]:
            block.rooted_at = begun_at
