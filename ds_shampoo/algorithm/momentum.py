"""The decay of the gradient's average over the steps: constant, or rising at first."""

from __future__ import annotations

import functools
from typing import NamedTuple

# A product of decays below this is nothing beside 1 in double precision.
_NOTHING = 2.0**-64


class MomentumSchedule(NamedTuple):
    """beta1 from step to step, counted from 1; a function of the step count, so there is nothing to save.

    A short average follows the gradient while it turns fast at first (K. Jordan et al., modded-nanogpt).

    Attributes:
        beta1: what it comes to.
        warmup_steps: the steps in which it rises, by as much in each; 0 for none.
        warmup_start: that of the first step, where it is below `beta1`.
    """

    beta1: float
    warmup_steps: int = 0
    warmup_start: float = 0.0

    def at(self, step: int) -> float:
        """That of a step."""
        missing = self.warmup_steps - (step - 1)
        if missing <= 0 or self.warmup_start >= self.beta1:
            return self.beta1
        return self.beta1 - (self.beta1 - self.warmup_start) * missing / self.warmup_steps

    def product(self, step: int) -> float:
        """Of those of all steps up to this one: what the average of so many gradients lacks of its weight of 1."""
        return _product(self, step) if self.warmup_steps else self.beta1**step


@functools.lru_cache(maxsize=64)
def _product(schedule: MomentumSchedule, step: int) -> float:
    found, rising = 1.0, min(step, schedule.warmup_steps)
    for number in range(1, rising + 1):
        found *= schedule.at(number)
        if found < _NOTHING:
            return 0.0
    return found * schedule.beta1 ** (step - rising)
