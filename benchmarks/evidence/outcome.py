"""Everything that was run of one study, and the JSON file that keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.evidence.figures import Figure, Spread, compare, difference
from benchmarks.evidence.jobs import Result
from benchmarks.evidence.protocol import Contender, Protocol, Study
from metric import Metric


@dataclass(frozen=True)
class Outcome:
    """Everything that was run of one study.

    Attributes:
        search: the runs that learning rates were chosen from; of those read from a file, their ends only.
        runs: the runs that figures are taken from.
        chosen: every contender's learning rate.
        machine: what it was run on.
    """

    study: Study
    protocol: Protocol
    search: Sequence[Result]
    runs: Sequence[Result]
    chosen: Mapping[str, float]
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

    def of(self, contender: Contender) -> list[Result]:
        """A contender's runs, one for each seed."""
        return [run for run in self.runs if run.job.contender == contender]

    def figures(self) -> list[Figure]:
        """Every contender against every other."""
        everyone = self.study.contenders
        return [compare(self.of(one), self.of(other)) for other in everyone for one in everyone if one is not other]

    def finals(self, contender: Contender) -> Spread:
        """The metric at the end of its schedule."""
        return Spread.of(run.final for run in self.of(contender))

    def beside_baseline(self, contender: Contender) -> Spread:
        """The metric at the end, less the baseline's of the same seed."""
        return difference(self.of(contender), self.of(self.study.baseline))


def to_json(outcome: Outcome) -> dict[str, Any]:
    """All numbers: the runs' ends, the figures, and every validation of every run."""
    study, protocol, metric = outcome.study, outcome.protocol, outcome.runs[0].metric
    return {
        "study": study.name,
        "title": study.title,
        "alike": study.alike,
        "protocol": protocol.name,
        "machine": dict(outcome.machine),
        "metric": metric._asdict(),
        "program": [study.program, *study.arguments],
        "steps": protocol.steps(study),
        "seeds": list(protocol.seeds),
        "chosen": {contender.name: outcome.chosen[contender.name] for contender in study.contenders},
        "grid": [_end(result) for result in outcome.search],
        "runs": [_end(result) | {"curve": curve(result)} for result in outcome.runs],
        "figures": [figure.to_json() for figure in outcome.figures()],
    }


def from_json(study: Study, protocol: Protocol, found: Mapping[str, Any]) -> Outcome:
    """What `to_json` was given, but for the records between validations.

    Raises:
        ValueError: if the file is of contenders that the study has no longer.
    """
    gone = set(found["chosen"]) - {contender.name for contender in study.contenders}
    if gone:
        raise ValueError(f"{study.name}: its results are of {', '.join(sorted(gone))} too: run it again")
    metric = Metric(**found["metric"])
    search, runs = ([_read(study, protocol, metric, run) for run in found[key]] for key in ("grid", "runs"))
    return Outcome(study, protocol, search, runs, found["chosen"], found["machine"])


def curve(result: Result) -> dict[str, list[float]]:
    """A run's validations."""
    found = [record for record in result.records if result.metric.key in record]
    return {
        "step": [record["step"] for record in found],
        "seconds": [record["seconds"] for record in found],
        "value": [record[result.metric.key] for record in found],
    }


def _end(result: Result) -> dict[str, Any]:
    job, last = result.job, result.records[-1]
    return {
        "contender": job.contender.name,
        "lr": job.lr,
        "seed": job.seed,
        "schedule": job.schedule,
        "commit": result.commit,
        "final": result.final,
        "seconds": last["seconds"],
        **{key: value for key, value in last.items() if key.startswith(("val_", "final_"))},
    }


def _read(study: Study, protocol: Protocol, metric: Metric, run: Mapping[str, Any]) -> Result:
    job = protocol.job(study, study.contender(run["contender"]), run["lr"], run["seed"])
    found = run.get("curve", {"step": [], "seconds": [], "value": []})
    points = zip(found["step"], found["seconds"], found["value"], strict=True)
    records = [{"step": step, "seconds": seconds, metric.key: value} for step, seconds, value in points]
    end = {key: value for key, value in run.items() if key.startswith(("val_", "final_"))}
    records = [*records[:-1], {"step": run["schedule"], "seconds": run["seconds"], **end}]
    return Result(replace(job, schedule=run["schedule"]), metric, records, run.get("commit"))
