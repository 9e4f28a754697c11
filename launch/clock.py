"""What training steps take, on the wall and of the processor."""

from __future__ import annotations

import time
from typing import NamedTuple


class Spent(NamedTuple):
    """Seconds of one step.

    Attributes:
        wall: from its beginning to its end.
        processor: of all threads of this process in it, and of all others than the calling one since the step before:
            roots that are solved beside an evaluation count, and the evaluation does not.
    """

    wall: float
    processor: float


class StepClock:
    """Started before each step, and asked after it, by the thread that trains."""

    def __init__(self) -> None:
        self._process, self._thread = time.process_time(), time.thread_time()
        self._wall, self._aside = 0.0, 0.0

    def start(self) -> None:
        """A step begins: what this thread did since the last one does not count."""
        self._aside = time.thread_time() - self._thread
        self._wall = time.perf_counter()

    def spent(self) -> Spent:
        """The step ends."""
        wall, process, aside = time.perf_counter() - self._wall, self._process, self._aside
        self._process, self._thread = time.process_time(), time.thread_time()
        return Spent(wall, self._process - process - aside)
