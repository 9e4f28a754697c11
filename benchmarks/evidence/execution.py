"""How a study is carried out: settings are chosen first, then the runs that figures are taken from are made."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from benchmarks import machine
from benchmarks.evidence.jobs import Cores, Result
from benchmarks.evidence.outcome import Outcome
from benchmarks.evidence.parts import prepare
from benchmarks.evidence.protocol import Contender, Protocol, Study
from benchmarks.evidence.search import Descent, Settings


def carry_out(
    study: Study,
    protocol: Protocol,
    cores: Cores,
    *,
    before: Mapping[str, Settings] | None = None,
    kept: Outcome | None = None,
) -> Outcome:
    """Runs a study.

    Args:
        before: what the study that its tuning goes on from has chosen, by the contenders' names.
        kept: results that stand as they are: only the contenders that they lack are run.

    Raises:
        JobError: for a job that failed.
        MissingDataError: for a corpus that is not there.
        ValueError: if `kept` comes from another machine.
    """
    here = machine.describe()
    if kept is None:
        kept = Outcome(study, protocol, [], [], {}, here)
    elif kept.machine != here:
        raise ValueError(f"{study.name}: its results come from {kept.machine}, this is {here}: seconds do not compare")
    prepare(study.corpus)
    lacking = [contender for contender in kept.lacking if contender.json_of is None]
    trials, chosen = tune(study, protocol, cores, contenders=lacking, before=before or {})
    everyone = {**kept.chosen, **chosen}
    for contender in kept.lacking:
        if contender.json_of is not None:
            everyone[contender.name] = contender.with_json_of(everyone[contender.json_of])
    runs = judge(study, protocol, cores, chosen=everyone, kept=kept.runs)
    return replace(kept, trials=[*kept.trials, *trials], runs=runs, chosen=everyone)


def tune(
    study: Study, protocol: Protocol, cores: Cores, *, contenders: Sequence[Contender], before: Mapping[str, Settings]
) -> tuple[list[Result], dict[str, Settings]]:
    """All trials, and every contender's choice: as many trials each, one contender's one after another."""
    tuning = study.tuning
    if tuning is None:
        return [], {contender.name: contender.settings for contender in contenders}
    prepare(tuning.corpus)

    def descend(contender: Contender) -> tuple[list[Result], Settings]:
        trials: list[Result] = []
        if not contender.axes:
            return trials, contender.settings

        def score(settings: Settings) -> float:
            trials.append(cores.run(protocol.trial(study, contender, settings)))
            return trials[-1].score

        start = protocol.start(study, contender, before)
        best = Descent(contender.axes, start, protocol.budget(tuning), score).run()
        return trials, best

    found = cores.each(descend, contenders)
    trials = [trial for tried, _ in found for trial in tried]
    return trials, {contender.name: best for contender, (_, best) in zip(contenders, found, strict=True)}


def judge(
    study: Study, protocol: Protocol, cores: Cores, *, chosen: Mapping[str, Settings], kept: Sequence[Result]
) -> list[Result]:
    """The runs of all contenders on the baseline's schedule, and on shorter or longer ones until they cross its end.

    Args:
        kept: runs that need not be made.
    """

    def at(contender: Contender, horizon: float) -> list[Result]:
        settings = chosen[contender.name]
        return cores.each(
            lambda seed: cores.run(protocol.run(study, contender, settings, seed=seed, horizon=horizon)), protocol.seeds
        )

    ready = {run.job.contender.name for run in kept}
    baseline = study.baseline
    ends = [run for run in kept if run.job.contender == baseline] or at(baseline, 1.0)
    target = median_score(ends)

    def around(contender: Contender) -> list[Result]:
        """On the baseline's schedule, and from there on towards the length at which it ends where the baseline does."""
        runs = at(contender, 1.0)
        if not protocol.horizons or study.alike:
            return runs
        good = median_score(runs) <= target
        for horizon in horizons_from_one(study, shorter=good):
            more = at(contender, horizon)
            runs += more
            if (median_score(more) <= target) != good:
                break
        return runs

    others = [contender for contender in study.contenders[1:] if contender.name not in ready]
    made = [] if baseline.name in ready else ends
    return [*kept, *made, *(run for runs in cores.each(around, others) for run in runs)]


def horizons_from_one(study: Study, *, shorter: bool) -> list[float]:
    """The study's horizons on one side of the baseline's, the nearest first."""
    if shorter:
        return sorted((horizon for horizon in study.horizons if horizon < 1), reverse=True)
    return sorted(horizon for horizon in study.horizons if horizon > 1)


def median_score(runs: Sequence[Result]) -> float:
    return statistics.median(run.score for run in runs)
