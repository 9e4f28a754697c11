"""When a step of everything begins and ends, though a framework may call once for each param group or part of one."""

from __future__ import annotations

import logging

from ds_shampoo.step.sharded_group import ShardedGroup
from ds_shampoo.step.subgroups import Subgroups

logger = logging.getLogger("ds_shampoo")


class Rounds:
    """Counts which subgroups have taken the present step."""

    def __init__(self, subgroups: Subgroups) -> None:
        self._subgroups = subgroups
        self._stepped: set[ShardedGroup] = set()
        self._expected = 0  # in the present step
        self._warned = False

    @property
    def complete(self) -> bool:
        """Whether everything has taken the step."""
        return len(self._stepped) == (self._expected if self._stepped else self._subgroups.expected())

    @property
    def under_way(self) -> bool:
        """Whether some subgroups have taken the step, and others not yet."""
        return bool(self._stepped) and not self.complete

    def begin(self, sharded: ShardedGroup, first: bool) -> None:
        """To be called before a subgroup's step: its statistics would overwrite what snapshots still read.

        Args:
            first: whether a step begins with this subgroup, in any case.
        """
        if not first and sharded not in self._stepped:
            return
        if not first and not self._warned:
            self._warned = True
            logger.warning(
                "a step began before all param groups had taken the last one (%d of %d parts had): if it was "
                "interrupted, load a checkpoint",
                len(self._stepped), self._expected,
            )  # fmt: skip
        self._stepped.clear()
        self._expected = self._subgroups.expected()
        for workplace in self._subgroups.workplaces:
            workplace.service.begin_step()

    def end(self, sharded: ShardedGroup) -> None:
        """To be called after a subgroup's step."""
        self._stepped.add(sharded)
        if self.complete:
            for workplace in self._subgroups.workplaces:
                workplace.stopwatch.end_step()

    def forget(self) -> None:
        """There are other subgroups from now on."""
        self._stepped.clear()
