"""The figures: steps and seconds of each contender to where the baseline ends, and how far apart they end."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.evidence.jobs import Result


@dataclass(frozen=True, slots=True)
class Spread:
    """A median over seeds, with the smallest and the largest; None where a seed never got there."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = sorted(values)
        return cls(statistics.median(values), values[0], values[-1])


@dataclass(frozen=True, slots=True)
class Figure:
    """One contender against one baseline.

    Attributes:
        steps, seconds: to the baseline's final metric, in parts of what the baseline took until it was as good for the
            first time; None where a seed's run never got there.
        faster: the baseline's steps over the contender's, the reciprocal of `steps`.
        reached: how many of the seeds got there.
    """

    contender: str
    baseline: str
    seeds: int
    reached: int
    steps: Spread | None
    seconds: Spread | None

    @property
    def faster(self) -> Spread | None:
        return None if self.steps is None else Spread(1 / self.steps.median, 1 / self.steps.most, 1 / self.steps.least)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"faster": None if self.faster is None else asdict(self.faster)}


def best_rate(results: Sequence[Result]) -> float:
    """The learning rate whose run ended best; a run that ended in NaN is the worst."""
    sign = 1 if results[0].metric.better == "lower" else -1
    return min(results, key=lambda result: (math.isnan(result.final), sign * result.final)).job.lr


def next_rate(results: Sequence[Result]) -> float | None:
    """The rate to try next: the neighbour that the best of these lacks, one step of the grid away; None if it has both.

    A contender whose grid is a single rate has that one by decree: None.
    """
    best, rates = best_rate(results), sorted(result.job.lr for result in results)
    if len(rates) == 1:
        return None
    step = rates[1] / rates[0]
    if best == rates[0]:
        return best / step
    return best * step if best == rates[-1] else None


def reached(result: Result, target: float) -> tuple[int, float] | None:
    """The step of the first validation at which the run was as good as `target`, and its seconds of training."""
    for record in result.records:
        if result.metric.key in record and result.metric.reached(record[result.metric.key], target):
            return int(record["step"]), float(record["seconds"])
    return None


def compare(runs: Sequence[Result], baselines: Sequence[Result]) -> Figure:
    """The figure of a contender's runs against a baseline's, one of each for every seed."""
    steps, seconds = [], []
    for baseline in baselines:
        own = reached(baseline, baseline.final)
        found = reached(_same_seed(runs, baseline), baseline.final)
        assert own is not None, "a run is as good as its own end at its end"
        if found is not None:
            steps.append(found[0] / own[0])
            seconds.append(found[1] / own[1])
    complete = len(steps) == len(baselines)
    return Figure(
        runs[0].job.contender.name,
        baselines[0].job.contender.name,
        len(baselines),
        len(steps),
        Spread.of(steps) if complete else None,
        Spread.of(seconds) if complete else None,
    )


def difference(runs: Sequence[Result], baselines: Sequence[Result]) -> Spread:
    """How much larger a contender's metric is at the end than a baseline's of the same seed."""
    return Spread.of(_same_seed(runs, baseline).final - baseline.final for baseline in baselines)


def _same_seed(runs: Sequence[Result], baseline: Result) -> Result:
    return next(run for run in runs if run.job.seed == baseline.job.seed)
