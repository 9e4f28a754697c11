"""When a block's statistics are updated, and when its roots are begun and put in force, by its own step count."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.config import GroupSettings


@dataclass(frozen=True, slots=True)
class RootSchedule:
    """The schedule of one param group; steps count from 1 (sections 2 and 3 of docs/algorithm.md)."""

    start_preconditioning_step: int
    statistics_interval: int
    root_interval: int

    @classmethod
    def of(cls, settings: GroupSettings) -> RootSchedule:
        return cls(settings.start_preconditioning_step, settings.statistics_interval, settings.root_interval)

    def statistics_due(self, step: int) -> bool:
        """Whether the statistics take this step's gradient in."""
        return step > 0 and (step - 1) % self.statistics_interval == 0

    def preconditions(self, step: int) -> bool:
        """Whether directions are preconditioned at this step, where roots are in force."""
        return step >= self.start_preconditioning_step

    def is_boundary(self, step: int, turn: int) -> bool:
        """Whether new roots are begun at this step for the block at this turn."""
        count, interval = step - self.start_preconditioning_step + 1, self.root_interval
        if count < 1:
            return False
        begin, length = _round_of(count, interval)
        return count == begin + length * (turn * _stride(interval) % interval) // interval

    def delay(self, step: int, usual: int) -> int:
        """Steps until the roots begun at this boundary are in force: `usual`, or early a quarter of the step count.

        They are there before the block's next ones are begun.
        """
        return min(usual, max(1, (step - self.start_preconditioning_step + 1) // 4))


def _round_of(count: int, interval: int) -> tuple[int, int]:
    """The step count at which a round began, and how many steps it takes; each block has one boundary in it.

    Statistics change fast at first: rounds take half of the steps so far, rounded up, until that is the interval.
    """
    begins = _early_rounds(interval)
    if count >= begins[-1]:
        return count - (count - begins[-1]) % interval, interval
    begin = begins[bisect.bisect_right(begins, count) - 1]
    return begin, (begin + 1) // 2


@functools.cache
def _early_rounds(interval: int) -> tuple[int, ...]:
    """Where rounds begin, up to the first that takes the whole interval: 1, 2, 3, 5, 8, 12, 18, 27, 41, ..."""
    begins = [1]
    while (begins[-1] + 1) // 2 < interval:
        begins.append(begins[-1] + (begins[-1] + 1) // 2)
    return tuple(begins)


@functools.cache
def _stride(interval: int) -> int:
    """How far apart blocks of neighbouring turns are in a round: about the golden section of it.

    So those of any few neighbours are spread over it, however many steps it takes. Without a divisor in common with
    the interval, which gives every step of it as many.
    """
    stride = max(1, interval * 618 // 1000)
    while math.gcd(stride, interval) > 1:
        stride += 1
    return stride


def turns_of(blocks: Sequence[Block], first: int = 0) -> list[int]:
    """Every block's turn, which decides its place in a round of boundaries: blocks of equal work follow each other.

    Each step of an interval then begins roots for an equal share of every size of block. Neighbours in the model
    are neighbours here, so the share is equal on every rank that owns a consecutive part of it too. The turns
    depend on the blocks alone, never on ranks.

    Args:
        first: the turn to begin with; the number of blocks in the param groups before this one.
    """
    order = sorted(range(len(blocks)), key=lambda i: (-sum(dim**3 for dim in blocks[i].factor_dims), i))
    turns = [0] * len(blocks)
    for turn, ordinal in enumerate(order, start=first):
        turns[ordinal] = turn
    return turns
