"""How a study is carried out: learning rates are chosen first, then the runs that figures are taken from are made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import machine
from benchmarks.evidence.figures import best_rate, next_rate
from benchmarks.evidence.jobs import Result, run_all
from benchmarks.evidence.outcome import Outcome
from benchmarks.evidence.protocol import Protocol, Study


def carry_out(
    study: Study, protocol: Protocol, runs: Path, cores: Sequence[int], kept: Outcome | None = None
) -> Outcome:
    """Runs a study.

    Args:
        runs, cores: as in `run_all`.
        kept: results that stand as they are: only the contenders that they lack are run.

    Raises:
        JobError: for a job that failed.
        ValueError: if `kept` comes from another machine.
    """
    here = machine.describe()
    if kept is None:
        kept = Outcome(study, protocol, [], [], {}, here)
    elif kept.machine != here:
        raise ValueError(f"{study.name}: its results come from {kept.machine}, this is {here}: seconds do not compare")
    part = replace(study, contenders=kept.lacking)
    trials = choose_from(part, protocol, runs, cores)
    chosen = {name: best_rate(results) for name, results in trials.items()}
    final = run_all(protocol.final(part, chosen), runs, cores)
    search = [result for results in trials.values() for result in results]
    return replace(kept, search=[*kept.search, *search], runs=[*kept.runs, *final], chosen={**kept.chosen, **chosen})


def choose_from(study: Study, protocol: Protocol, runs: Path, cores: Sequence[int]) -> dict[str, list[Result]]:
    """Every contender's trials; under a protocol with grids, until each best rate has a neighbour on both sides."""
    search: dict[str, list[Result]] = {contender.name: [] for contender in study.contenders}
    jobs = protocol.search(study)
    while jobs:
        for result in run_all(jobs, runs, cores):
            search[result.job.contender.name].append(result)
        ahead = {contender: next_rate(search[contender.name]) for contender in study.contenders if protocol.grid}
        jobs = [protocol.trial(study, contender, lr) for contender, lr in ahead.items() if lr is not None]
    return search
