"""How long the phases of a step take on the device, measured without making the host wait for it."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ds_shampoo.accelerators import module_of

PHASES = ("elementwise", "exchange", "statistics", "roots", "precondition")

# Steps whose events the device may be behind with before the oldest are given up.
_MOST_OPEN_STEPS = 64


class Stopwatch:
    """Adds up, per step, the milliseconds of each phase; of the wall clock on a CPU, of device events elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._module: Any = module_of(device)
        self._open: list[tuple[str, Any, Any]] = []
        self._closed: deque[list[tuple[str, Any, Any]]] = deque(maxlen=_MOST_OPEN_STEPS)
        self._last = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what is done, or given to the device, inside it."""
        begin = self._mark()
        try:
            yield
        finally:
            self._open.append((name, begin, self._mark()))

    def end_step(self) -> None:
        """Closes the books of a step."""
        self._closed.append(self._open)
        self._open = []

    def read(self, sync: bool = False) -> dict[str, float]:
        """Milliseconds by phase of the newest step that the device is through with.

        Args:
            sync: wait for the newest step of all.
        """
        while self._closed and (sync or self._finished(self._closed[0])):
            step = self._closed.popleft()
            self._last = dict.fromkeys(PHASES, 0.0)
            for name, begin, end in step:
                self._last[name] += self._milliseconds(begin, end)
        return dict(self._last)

    def _mark(self) -> Any:
        if self._module is None:
            return time.perf_counter()
        event = self._module.Event(enable_timing=True)
        event.record()
        return event

    def _finished(self, step: list[tuple[str, Any, Any]]) -> bool:
        return self._module is None or all(end.query() for _, _, end in step)

    def _milliseconds(self, begin: Any, end: Any) -> float:
        if self._module is None:
            return 1e3 * float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end))
