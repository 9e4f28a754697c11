"""One table over all studies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from benchmarks.evidence.outcome import Outcome
from benchmarks.evidence.report import commits, crossed, passed, spread, table


def summary(outcomes: Iterable[Outcome]) -> str:
    """Every contender against its study's baseline."""
    outcomes = list(outcomes)
    header = ("task", "judged by", "optimizer", "ends at", "steps", "seconds", "shown at", "within one run", "commit")
    rows = [row for outcome in outcomes if not outcome.study.alike for row in _rows(outcome)]
    options = [f"- [{each.study.title}]({each.study.name}.md)" for each in outcomes if each.study.alike]
    return "\n".join(
        [
            "# Results",
            "",
            "The first optimizer of each task is the one that the others are measured by; all have schedules of their",
            "own length. *Steps* and *seconds*: of the run that ends where the first one's ends, in parts of the first",
            "one's, with one standard error to each side; below the shortest that was run, above the longest. *Shown",
            "at*: the shortest schedule on which three standard errors say that it ends better. *Within one run*: the",
            "steps to that end on the first one's schedule; where not all seeds get there, how many do and where each",
            "ends. Ends are medians over seeds with the smallest and the largest.",
            "",
            *table(header, rows),
            "",
            *(["Settings that should change little:", "", *options, ""] if options else []),
        ]
    )


def _rows(outcome: Outcome) -> Iterable[Sequence[str]]:
    study = outcome.study
    link = f"[{study.title}]({study.name}.md)"
    yield link, outcome.metric.label, study.baseline.name, _end(outcome, 0), "1", "1", "", "1", commits(outcome)
    for number, contender in enumerate(study.contenders[1:], 1):
        figure = outcome.figure(contender, study.baseline)
        sure = "not shown" if figure.shown is None else f"{figure.shown:g}"
        lengths = crossed(figure, "steps"), crossed(figure, "seconds")
        yield "", "", contender.name, _end(outcome, number), *lengths, sure, passed(figure.within, "steps"), ""


def _end(outcome: Outcome, number: int) -> str:
    return spread(outcome.finals(outcome.study.contenders[number]), 4)
