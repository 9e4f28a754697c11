"""The figures: on which schedule a contender ends where the baseline does, and how sure that is.

Scores are metrics so turned that less is better (`Result.score`).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.evidence.jobs import Result

# What z has to be for a difference to count as shown: 0.0040 of a sigma of 0.0013, modded-nanogpt's optimization track.
SHOWN = 3.0


@dataclass(frozen=True, slots=True)
class Spread:
    """A median over seeds, with the smallest and the largest; nan where one of them diverged."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        values = list(values)
        if any(math.isnan(value) for value in values):
            return cls(math.nan, math.nan, math.nan)
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Sigma:
    """How much the ends of two seeds differ: the deviation within one contender and schedule, pooled over all.

    Attributes:
        value: in the metric's unit.
        freedom: degrees of freedom, the runs less the groups they come from.
    """

    value: float
    freedom: int


@dataclass(frozen=True, slots=True)
class Level:
    """A contender on schedules of one length, beside where the baseline ends.

    Attributes:
        horizon, steps: the length, in parts of the baseline's and in steps.
        ends: the metric at the end.
        seeds, reached: how many runs there are, and how many end as good as the baseline's median.
        z: by how many of its standard errors the mean is better than the baseline's; None without a sigma.
        seconds: of training, in parts of the baseline's median.
        score: the median score.
    """

    horizon: float
    steps: int
    ends: tuple[float, ...]
    seeds: int
    reached: int
    z: float | None
    seconds: Spread
    score: float


@dataclass(frozen=True, slots=True)
class Crossing:
    """Where a contender ends as the baseline does, in parts of the baseline's steps and seconds.

    Attributes:
        kind: "at" that length, "below" the shortest that was run, or "above" the longest.
    """

    kind: Literal["at", "below", "above"]
    steps: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Within:
    """The first validation at which a contender's run on the baseline's schedule is as good as the baseline ends.

    Attributes:
        steps, seconds: in parts of what the baseline of the same seed took to be so for the first time; None where not
            all seeds got there.
        ends: where the runs end.
    """

    seeds: int
    reached: int
    steps: Spread | None
    seconds: Spread | None
    ends: tuple[float, ...]


def sigma_of(runs: Iterable[Result]) -> Sigma | None:
    """The pooled deviation of runs that came to their ends; None where no contender has two seeds on one schedule."""
    groups: dict[tuple[str, int], list[float]] = {}
    for run in runs:
        if math.isfinite(run.score):
            groups.setdefault((run.job.contender.name, run.job.schedule), []).append(run.score)
    freedom = sum(len(group) - 1 for group in groups.values())
    if not freedom:
        return None
    squares = sum((score - statistics.fmean(group)) ** 2 for group in groups.values() for score in group)
    return Sigma(math.sqrt(squares / freedom), freedom)


def z_of(runs: Sequence[Result], baselines: Sequence[Result], sigma: Sigma | None) -> float | None:
    """By how many standard errors the mean of runs is better than that of the baseline's, both of which are uncertain.

    (target - mean) / (sigma sqrt(1 / n + 1 / m)): with a target that is known, m would be infinite.
    """
    if sigma is None or not sigma.value:
        return None
    means = [statistics.fmean(run.score for run in each) for each in (runs, baselines)]
    if math.inf in means:
        return -math.inf if means[0] == math.inf else math.inf
    return (means[1] - means[0]) / (sigma.value * math.sqrt(1 / len(runs) + 1 / len(baselines)))


def levels(runs: Sequence[Result], baselines: Sequence[Result], sigma: Sigma | None) -> list[Level]:
    """A contender's runs by the length of their schedules, the longest first."""
    target = statistics.median(run.score for run in baselines)
    seconds = statistics.median(run.seconds for run in baselines)
    groups: dict[float, list[Result]] = {}
    for run in runs:
        groups.setdefault(run.job.horizon, []).append(run)
    return [
        Level(
            horizon=horizon,
            steps=group[0].job.schedule,
            ends=tuple(run.final for run in group),
            seeds=len(group),
            reached=sum(run.score <= target for run in group),
            z=z_of(group, baselines, sigma),
            seconds=Spread.of(math.nan if run.diverged else run.seconds / seconds for run in group),
            score=statistics.median(run.score for run in group),
        )
        for horizon, group in sorted(groups.items(), reverse=True)
    ]


def crossing(found: Sequence[Level], target: float) -> Crossing:
    """Where the median score is `target`, between two neighbouring lengths linear in the logarithm of steps.

    Args:
        found: a contender's levels, the longest first.
        target: the baseline's median score.
    """
    first, last = found[0], found[-1]
    if first.score > target:
        return Crossing("above", first.horizon, first.seconds.median)
    for long, short in itertools.pairwise(found):
        if short.score > target:
            part = (target - long.score) / (short.score - long.score)
            if not part:  # the longer one ends there to the point, or the shorter one diverged
                return Crossing("at", long.horizon, long.seconds.median)
            pairs = (long.horizon, short.horizon), (long.seconds.median, short.seconds.median)
            steps, seconds = (math.exp((1 - part) * math.log(a) + part * math.log(b)) for a, b in pairs)
            return Crossing("at", steps, seconds)
    return Crossing("below", last.horizon, last.seconds.median)


def shown(found: Sequence[Level]) -> Level | None:
    """The shortest schedule on which the contender is better than the baseline by `SHOWN` standard errors, of those
    from the longest on that all are; None where not even the longest is."""
    best = None
    for level in found:
        if level.z is None or level.z < SHOWN:
            break
        best = level
    return best


def first_as_good(result: Result, target: float) -> tuple[int, float] | None:
    """The step of the first validation at which the run was as good as `target`, and its seconds of training."""
    for record in result.records:
        if result.metric.key in record and result.metric.reached(record[result.metric.key], target):
            return int(record["step"]), float(record["seconds"])
    return None


def within(runs: Sequence[Result], baselines: Sequence[Result]) -> Within:
    """A contender's runs against a baseline's on one schedule, each against that of its own seed."""
    steps, seconds = [], []
    own = {run.job.seed: run for run in runs}
    for baseline in baselines:
        there = first_as_good(baseline, baseline.final)
        found = first_as_good(own[baseline.job.seed], baseline.final)
        if found is not None and there is not None:
            steps.append(found[0] / there[0])
            seconds.append(found[1] / there[1])
    complete = len(steps) == len(baselines)
    return Within(
        seeds=len(baselines),
        reached=len(steps),
        steps=Spread.of(steps) if complete else None,
        seconds=Spread.of(seconds) if complete else None,
        ends=tuple(own[baseline.job.seed].final for baseline in baselines),
    )


def difference(runs: Sequence[Result], baselines: Sequence[Result]) -> Spread:
    """How much larger a contender's metric is at the end than a baseline's of the same seed."""
    own: Mapping[int, float] = {run.job.seed: run.final for run in runs}
    return Spread.of(own[baseline.job.seed] - baseline.final for baseline in baselines)
