"""Steps of a job in which no roots are begun or put in force."""

from __future__ import annotations

from ds_shampoo import Shampoo
from ds_shampoo.roots.schedule import RootSchedule


def quiet_steps(optimizer: Shampoo, root_interval: int, root_delay: int, count: int) -> int:
    """The first of `count` such steps after all blocks have roots; the optimizer is to have taken one step."""
    schedule, busy = RootSchedule(1, 1, root_interval), set[int]()
    for step in range(1, 3 * root_interval):
        if any(schedule.is_boundary(step, turn) for turn in optimizer.turns.values()):
            busy |= {step, step + schedule.delay(step, root_delay)}
    return next(t for t in range(3, 3 * root_interval) if not busy & {*range(t, t + count)})
