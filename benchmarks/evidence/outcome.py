"""Everything that was run of one study, and the JSON file that keeps it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.evidence.figures import (
    Crossing,
    Level,
    Sigma,
    Spread,
    Within,
    crossing,
    difference,
    levels,
    shown,
    sigma_of,
    within,
)
from benchmarks.evidence.jobs import Result
from benchmarks.evidence.protocol import Contender, Job, Protocol, Study
from benchmarks.evidence.search import Settings
from metric import Metric


@dataclass(frozen=True, slots=True)
class Figure:
    """One contender against another, which is the baseline here.

    Attributes:
        levels: the contender's schedules, the longest first.
        crossing: the schedule on which it ends where the baseline does.
        least, most: the same for ends better and worse than the baseline's by one standard error of a difference;
            None without a sigma.
        shown: the shortest schedule on which it is better for sure; None for none.
        within: where its run on the baseline's schedule passes the baseline's end.
    """

    contender: str
    baseline: str
    levels: Sequence[Level]
    crossing: Crossing
    least: Crossing | None
    most: Crossing | None
    shown: float | None
    within: Within


@dataclass(frozen=True)
class Outcome:
    """Everything that was run of one study.

    Attributes:
        trials: the runs that settings were chosen from; of those read from a file, their ends only.
        runs: the runs that figures are taken from.
        chosen: every contender's settings.
        machine: what it was run on.
    """

    study: Study
    protocol: Protocol
    trials: Sequence[Result]
    runs: Sequence[Result]
    chosen: Mapping[str, Settings]
    machine: Mapping[str, Any]

    @property
    def lacking(self) -> tuple[Contender, ...]:
        """The study's contenders that were not run."""
        return tuple(contender for contender in self.study.contenders if contender.name not in self.chosen)

    def complete(self) -> Outcome:
        """The outcome of a study of those contenders alone that were run; says which were not."""
        if not self.lacking:
            return self
        names = ", ".join(contender.name for contender in self.lacking)
        print(f"{self.study.name}: its results lack {names}, which --missing runs", flush=True)
        present = tuple(contender for contender in self.study.contenders if contender not in self.lacking)
        return replace(self, study=replace(self.study, contenders=present))

    @property
    def metric(self) -> Metric:
        return self.runs[0].metric

    @property
    def commits(self) -> list[str]:
        """The states of the code that ran all this, trials among it."""
        return sorted({run.commit for run in (*self.trials, *self.runs) if run.commit})

    @property
    def sigma(self) -> Sigma | None:
        return sigma_of(self.runs)

    def of(self, contender: Contender) -> list[Result]:
        """A contender's runs on the baseline's schedule, one for each seed."""
        return [run for run in self.runs if run.job.contender == contender and run.job.horizon == 1]

    def all_of(self, contender: Contender) -> list[Result]:
        """A contender's runs on schedules of any length."""
        return [run for run in self.runs if run.job.contender == contender]

    def trials_of(self, contender: Contender) -> list[Result]:
        """In the order in which they were made."""
        return [trial for trial in self.trials if trial.job.contender == contender]

    def figure(self, contender: Contender, baseline: Contender) -> Figure:
        """A contender against another one on the study's schedule."""
        ends, sigma = self.of(baseline), self.sigma
        found = levels(self.all_of(contender), ends, sigma)
        (own,) = levels(ends, ends, sigma)
        error = sigma.value * (2 / len(ends)) ** 0.5 if sigma else None
        sure = shown(found)
        return Figure(
            contender=contender.name,
            baseline=baseline.name,
            levels=found,
            crossing=crossing(found, own.score),
            least=None if error is None else crossing(found, own.score + error),
            most=None if error is None else crossing(found, own.score - error),
            shown=None if sure is None else sure.horizon,
            within=within(self.of(contender), ends),
        )

    def figures(self) -> list[Figure]:
        """Every contender against the first two, which are the tuned baselines."""
        everyone = self.study.contenders
        return [self.figure(one, other) for other in everyone[:2] for one in everyone if one is not other]

    def finals(self, contender: Contender) -> Spread:
        """The metric at the end of the study's schedule."""
        return Spread.of(run.final for run in self.of(contender))

    def beside_baseline(self, contender: Contender) -> Spread:
        """The metric at the end, less the baseline's of the same seed."""
        return difference(self.of(contender), self.of(self.study.baseline))


def to_json(outcome: Outcome) -> dict[str, Any]:
    """All numbers: trials, the runs' ends, the figures, and every validation of every run."""
    study, protocol, tuning = outcome.study, outcome.protocol, outcome.study.tuning
    found = {
        "study": study.name,
        "title": study.title,
        "alike": study.alike,
        "protocol": protocol.name,
        "machine": dict(outcome.machine),
        "commits": outcome.commits,
        "metric": outcome.metric._asdict(),
        "program": [study.program, *study.arguments],
        "corpus": study.corpus,
        "steps": protocol.steps(study),
        "seeds": list(protocol.seeds),
        "tuning": None if tuning is None else asdict(tuning) | {"seed": protocol.tuning_seed},
        "sigma": None if outcome.sigma is None else asdict(outcome.sigma),
        "chosen": {contender.name: dict(outcome.chosen[contender.name]) for contender in study.contenders},
        "trials": [_end(trial) for trial in outcome.trials],
        "runs": [_end(run) | {"curve": curve(run)} for run in outcome.runs],
        "figures": [] if study.alike else [asdict(figure) for figure in outcome.figures()],
    }
    return _finite(found)


def from_json(study: Study, protocol: Protocol, found: Mapping[str, Any]) -> Outcome:
    """What `to_json` was given, but for the records between validations.

    Raises:
        ValueError: if the file is of contenders that the study has no longer.
    """
    gone = set(found["chosen"]) - {contender.name for contender in study.contenders}
    if gone:
        raise ValueError(f"{study.name}: its results are of {', '.join(sorted(gone))} too: run it again")
    metric = Metric(**found["metric"])
    trials, runs = (
        [_read(study, run, metric, tuning=key == "trials") for run in found[key]] for key in ("trials", "runs")
    )
    return Outcome(study, protocol, trials, runs, found["chosen"], found["machine"])


def curve(result: Result) -> dict[str, list[float]]:
    """A run's validations."""
    found = [record for record in result.records if result.metric.key in record]
    return {
        "step": [record["step"] for record in found],
        "seconds": [record["seconds"] for record in found],
        "value": [record[result.metric.key] for record in found],
    }


def _finite(value: Any) -> Any:
    """The same with null for what JSON has no number for: where a run diverged."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value


def _end(result: Result) -> dict[str, Any]:
    job, last = result.job, result.records[-1] if result.records else {}
    return {
        "contender": job.contender.name,
        "settings": dict(job.settings),
        "seed": job.seed,
        "horizon": job.horizon,
        "schedule": job.schedule,
        "commit": result.commit,
        "diverged": result.diverged,
        "final": result.final,
        "seconds": result.seconds,
        **{key: value for key, value in last.items() if key.startswith(("val_", "final_"))},
    }


def _read(study: Study, run: Mapping[str, Any], metric: Metric, *, tuning: bool) -> Result:
    contender = study.contender(run["contender"])
    job = Job(study, contender, run["settings"], run["seed"], run["horizon"], run["schedule"], 1, tuning=tuning)
    found = run.get("curve", {"step": [], "seconds": [], "value": []})
    points = zip(found["step"], found["seconds"], found["value"], strict=True)
    records = [{"step": step, "seconds": seconds, metric.key: value} for step, seconds, value in points]
    end = {key: value for key, value in run.items() if key.startswith(("val_", "final_"))}
    if not run["diverged"]:
        records = [*records[:-1], {"step": run["schedule"], "seconds": run["seconds"], **end}]
    elif not records:
        records = [{"step": run["diverged"], "seconds": run["seconds"]}]
    return Result(job, metric, records, run["commit"], run["diverged"])
