"""When a block's statistics are updated and when its roots are due, from the parameter's own step count."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RootSchedule:
    """The schedule of one param group; steps count from 1 (sections 2 and 3 of docs/algorithm.md)."""

    start_preconditioning_step: int
    statistics_interval: int
    root_interval: int

    def statistics_due(self, step: int) -> bool:
        """Whether the statistics take this step's gradient in."""
        return step > 0 and (step - 1) % self.statistics_interval == 0

    def preconditions(self, step: int) -> bool:
        """Whether directions are preconditioned at this step, where roots are in force."""
        return step >= self.start_preconditioning_step

    def is_boundary(self, step: int) -> bool:
        """Whether new roots are due at this step."""
        return self.preconditions(step) and (step - self.start_preconditioning_step) % self.root_interval == 0
