"""Keeps the inverse roots of a stack of blocks fresh: jobs, adaptive refresh, failures, and counts of it all."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_shampoo.algorithm.preconditioner import ShampooPreconditioner
from ds_shampoo.algorithm.roots import InverseRoot, Outcome, inverse_root
from ds_shampoo.config import GroupSettings

logger = logging.getLogger("ds_shampoo")

# Warnings of one kind after these many occurrences, so that a run of months stays readable.
_WARN_AT = frozenset({1, 10, 100, 1000, 10_000, 100_000})


@dataclass(frozen=True, slots=True)
class RootJob:
    """One inverse root to compute: X = (A + epsilon lambda_max(A) I)^(-1/p) of a statistic A, [d, d]."""

    matrix: Tensor
    p: int
    epsilon: float
    method: str

    def solve(self) -> InverseRoot:
        """Runs the job on the calling thread."""
        return inverse_root(self.matrix, self.p, self.epsilon, self.method)


@dataclass
class RootCounts:
    """What became of the roots so far.

    Attributes:
        updates: roots put in force.
        fallbacks: those of them that a fallback gave.
        skipped: boundaries at which a statistic had moved too little to be solved again.
        rejected: boundaries at which a factor got no root although it has statistics.
    """

    updates: int = 0
    fallbacks: int = 0
    skipped: int = 0
    rejected: int = 0


@dataclass
class _BlockRoots:
    """The history of one block's roots.

    Attributes:
        rooted: per factor, the statistic of the last root (CPU), kept for adaptive refresh only.
        solved: per factor, whether a root was ever accepted.
        failures: consecutive boundaries at which a factor was rejected.
        updated_at: the step at which the roots in force were installed; 0 for none.
    """

    rooted: list[Tensor | None]
    solved: list[bool]
    failures: int = 0
    updated_at: int = 0


class RootKeeper:
    """Computes the roots of one stack within the training step, at each block's boundary."""

    def __init__(self, preconditioner: ShampooPreconditioner, counts: RootCounts) -> None:
        self._stack = preconditioner
        self._counts = counts
        factors = len(preconditioner.factors)
        self._blocks = [_BlockRoots([None] * factors, [False] * factors) for _ in preconditioner.blocks]

    def refresh(self, due: Mapping[int, int], settings: GroupSettings) -> None:
        """Brings the roots of the slots that are due, each with its step, up to date with their statistics.

        A rejected root leaves the old one in force; `max_root_failures` boundaries with a rejection in a row
        take the block back to its grafting step until all its factors have a root again.
        """
        with single_threaded():
            for slot, step in due.items():
                if self._stack.updates[slot]:
                    self._refresh_block(slot, step, settings)

    def age(self, slot: int, step: int) -> int | None:
        """Steps since the slot's roots in force were installed; None where there are none."""
        return step - self._blocks[slot].updated_at if self._stack.ready[slot] else None

    def block_state(self, slot: int) -> dict[str, Any]:
        """What `load_block_state` needs beside the preconditioner's own state."""
        block = self._blocks[slot]
        rooted = [tensor for tensor in block.rooted if tensor is not None]
        return {
            "rooted": rooted,
            "solved": list(block.solved),
            "failures": block.failures,
            "updated_at": block.updated_at,
        }

    def load_block_state(self, slot: int, state: Mapping[str, Any]) -> None:
        rooted: list[Tensor | None] = [tensor.clone() for tensor in state["rooted"]]
        if len(rooted) != len(self._stack.factors):
            rooted = [None] * len(self._stack.factors)
        self._blocks[slot] = _BlockRoots(
            rooted,
            [bool(solved) for solved in state["solved"]],
            int(state["failures"]),
            int(state["updated_at"]),
        )

    def _refresh_block(self, slot: int, step: int, settings: GroupSettings) -> None:
        block = self._blocks[slot]
        reasons = [
            reason
            for factor in range(len(self._stack.factors))
            if (reason := self._refresh_factor(slot, factor, settings)) is not None
        ]
        if reasons:
            block.failures += 1
            self._warn(slot, reasons[0])
            if block.failures == settings.max_root_failures:
                self._stack.ready[slot] = False
                logger.warning(
                    "block %s got no root at %d boundaries in a row and takes its grafting step from now on",
                    self._stack.blocks[slot], block.failures,
                )  # fmt: skip
            return
        if block.failures >= settings.max_root_failures:
            logger.warning("block %s has a root again and is preconditioned again", self._stack.blocks[slot])
        block.failures = 0
        self._stack.ready[slot] = all(block.solved)
        if self._stack.ready[slot]:
            block.updated_at = step

    def _refresh_factor(self, slot: int, factor: int, settings: GroupSettings) -> str | None:
        """Returns why the factor got no root, or None if it has one or needs none."""
        block = self._blocks[slot]
        p = settings.inverse_exponent_override or 2 * len(self._stack.factors)
        matrix = self._stack.statistic(slot, factor, settings.statistics_beta).cpu()
        target = self._stack.roots[factor][slot]
        former = block.rooted[factor]
        if settings.root_refresh_threshold > 0 and former is not None:
            moved, scale = relative_move(former, matrix)
            if moved < settings.root_refresh_threshold:
                target.mul_(scale ** (-1.0 / p))
                block.rooted[factor] = former * scale
                self._counts.skipped += 1
                return None
        result = RootJob(matrix, p, settings.matrix_epsilon, settings.root_method).solve()
        if result.root is None:
            if result.outcome is Outcome.ZERO:
                return None
            self._counts.rejected += 1
            return result.method
        target.copy_(result.root)
        block.solved[factor] = True
        block.rooted[factor] = matrix if settings.root_refresh_threshold > 0 else None
        self._counts.updates += 1
        if result.outcome is Outcome.FALLBACK:
            self._counts.fallbacks += 1
            if self._counts.fallbacks in _WARN_AT:
                logger.warning(
                    "block %s: the root came from a fallback (%s); %d so far",
                    self._stack.blocks[slot], result.method, self._counts.fallbacks,
                )  # fmt: skip
        return None

    def _warn(self, slot: int, reason: str) -> None:
        if self._counts.rejected in _WARN_AT:
            logger.warning(
                "block %s: a root was rejected (%s) and the old one stays in force; %d rejected so far",
                self._stack.blocks[slot], reason, self._counts.rejected,
            )  # fmt: skip


def relative_move(former: Tensor, present: Tensor) -> tuple[float, float]:
    """How far a statistic moved, ‖A/‖A‖ - A₀/‖A₀‖‖_F, and its change of scale, ‖A‖/‖A₀‖."""
    norms = float(former.norm()), float(present.norm())
    return float((present / norms[1] - former / norms[0]).norm()), norms[1] / norms[0]


@contextmanager
def single_threaded() -> Iterator[None]:
    """Holds torch to one OpenMP thread: eigh on several threads of shared cores is up to 75 times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
