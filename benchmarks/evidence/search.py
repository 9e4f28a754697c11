"""Coordinate descent over an optimizer's settings, with a fixed number of trials."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

Value: TypeAlias = float | int | str | bool | None
Settings: TypeAlias = Mapping[str, Value]

# Digits of a value halfway between two others.
_DIGITS = 3


@dataclass(frozen=True)
class Axis:
    """One setting that is tuned.

    Attributes:
        key: of the contender's settings, which say where it starts.
        values: what it may be, so ordered that neighbours differ least.
    """

    key: str
    values: tuple[Value, ...]

    def around(self, value: Value) -> Axis:
        """The axis with this value in its place among the others, where a search begins between them."""
        if value in self.values:
            return self
        assert isinstance(value, float | int), f"{self.key}: {value!r} is none of {self.values}"
        return Axis(self.key, tuple(sorted((*self.values, value))))

    def finer(self) -> Axis:
        """The axis with a value halfway between each two that are fractions: by ratio, or from 0 by difference."""
        values = list(self.values[:1])
        for low, high in itertools.pairwise(self.values):
            if isinstance(low, float) and isinstance(high, float):
                middle = math.sqrt(low * high) if low > 0 and high > 0 else (low + high) / 2
                rounded = float(f"{middle:.{_DIGITS}g}")
                values += [rounded] if rounded not in (low, high) else []
            values.append(high)
        return Axis(self.key, tuple(values))


class _SpentError(Exception):
    """The budget is spent."""


class Descent:
    """A search for the settings with the least score.

    From where it starts it goes along one axis after the other, to the best of a line: up as long as that improves,
    and down where up did not. Where a pass over all axes has found nothing better, the axes become finer. It is
    deterministic, so that a search whose trials are known takes the same way again.
    """

    def __init__(self, axes: Sequence[Axis], start: Settings, budget: int, score: Callable[[Settings], float]) -> None:
        """
        Args:
            axes: in the order in which they are gone along.
            start: all settings, those of the axes among them.
            budget: how many different settings are tried.
            score: of settings, the smaller the better; inf where they failed.
        """
        self._axes = [axis.around(start[axis.key]) for axis in axes]
        self._budget, self._score = budget, score
        self.best = dict(start)
        self._tried: dict[tuple[Value, ...], float] = {}

    def run(self) -> Settings:
        """The best settings tried when the budget is spent, or no axis can become finer."""
        try:
            self._try(self.best)
            while True:
                before = self.best
                for axis in self._axes:
                    self._line(axis)
                if self.best == before:
                    finer = [axis.finer() for axis in self._axes]
                    if finer == self._axes:
                        return self.best
                    self._axes = finer
        except _SpentError:
            return self.best

    def _line(self, axis: Axis) -> None:
        start = self.best
        for way in (1, -1):
            at = axis.values.index(self.best[axis.key]) + way
            while 0 <= at < len(axis.values) and self._try({**self.best, axis.key: axis.values[at]}):
                at += way
            if self.best != start:
                return

    def _try(self, settings: Settings) -> bool:
        """Whether these are the best from now on."""
        key = tuple(settings[axis.key] for axis in self._axes)
        if key in self._tried:
            return False
        if len(self._tried) == self._budget:
            raise _SpentError
        self._tried[key] = self._score(settings)
        if self._tried[key] >= min((score for other, score in self._tried.items() if other != key), default=math.inf):
            return False
        self.best = dict(settings)
        return True
