"""When a block's statistics are updated, and when its roots are begun and put in force, by its own step count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.config import GroupSettings

# Blocks begin their first roots within so many steps, however long the interval is.
FIRST_WITHIN = 10


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
        passed, own = step - self.start_preconditioning_step, turn % self.root_interval
        return passed == own % FIRST_WITHIN or (passed >= own and (passed - own) % self.root_interval == 0)

    def delay(self, step: int, turn: int, usual: int) -> int:
        """Steps until the roots begun at this boundary are in force: `usual`, or fewer, to be there before the next."""
        passed, own = step - self.start_preconditioning_step, turn % self.root_interval
        return min(usual, own - passed) if passed < own else usual


def turns_of(blocks: Sequence[Block], first: int = 0) -> list[int]:
    """Every block's place in a round of boundaries: blocks of equal work follow each other, one step apart.

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
