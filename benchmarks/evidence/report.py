"""What a study's results look like: a JSON file, a table, and curves over steps and over seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # Training machines have no display.

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.evidence.figures import Figure, Spread, compare
from benchmarks.evidence.jobs import Result
from benchmarks.evidence.protocol import Contender, Protocol, Study


@dataclass(frozen=True)
class Outcome:
    """Everything that was run of one study.

    Attributes:
        search: the runs that learning rates were chosen from.
        runs: the runs that figures are taken from.
        chosen: every contender's learning rate.
    """

    study: Study
    protocol: Protocol
    search: Sequence[Result]
    runs: Sequence[Result]
    chosen: Mapping[str, float]

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


def to_json(outcome: Outcome, machine: Mapping[str, Any]) -> dict[str, Any]:
    """All numbers: the runs' ends, the figures, and every validation of every run."""
    study, protocol, metric = outcome.study, outcome.protocol, outcome.runs[0].metric
    return {
        "study": study.name,
        "title": study.title,
        "protocol": protocol.name,
        "machine": dict(machine),
        "metric": metric._asdict(),
        "program": [study.program, *study.arguments],
        "steps": protocol.steps(study),
        "seeds": list(protocol.seeds),
        "chosen": {contender.name: outcome.chosen[contender.name] for contender in study.contenders},
        "grid": [_end(result) for result in outcome.search],
        "runs": [_end(result) | {"curve": _curve(result)} for result in outcome.runs],
        "figures": [figure.to_json() for figure in outcome.figures()],
    }


def to_markdown(outcome: Outcome) -> str:
    """The study's section of the results."""
    study, metric = outcome.study, outcome.runs[0].metric
    seeds = len(outcome.protocol.seeds)
    extra = sorted(key for key in outcome.runs[0].records[-1] if key.startswith("final_"))
    header = ["optimizer", "rate", "steps", metric.label, *(key.removeprefix("final_") for key in extra), "ms a step"]
    for baseline in study.contenders[: max(1, len(study.contenders) - 1)]:
        header += [f"steps to {baseline.name}'s end", "seconds"]
    rows = [_row(outcome, contender, extra) for contender in study.contenders]
    return "\n".join(
        [
            f"## {study.title}",
            "",
            f"`{' '.join((f'launch/{study.program}', *study.arguments))}`, {seeds} seed{'s' if seeds > 1 else ''}. "
            "Steps and seconds to another's end are parts of what that one took.",
            "",
            "| " + " | ".join(header) + " |",
            "|" + "---|" * len(header),
            *("| " + " | ".join(row) + " |" for row in rows),
            "",
            *_grid_lines(outcome),
            "",
            f"![{metric.label} over steps and over seconds]({study.name}.png)",
            "",
        ]
    )


def draw(outcome: Outcome, path: Path) -> None:
    """The validation metric over steps and over seconds: medians, and every seed faintly."""
    metric = outcome.runs[0].metric
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    for ax, key, label in zip(axes, ("step", "seconds"), ("step", "seconds of training on one core"), strict=True):
        for number, contender in enumerate(outcome.study.contenders):
            curves = [_curve(run) for run in outcome.of(contender)]
            middle = {k: np.median([curve[k] for curve in curves], axis=0) for k in ("step", "seconds", "value")}
            ax.plot(middle[key], middle["value"], color=f"C{number}", label=contender.name)
            for curve in curves if len(curves) > 1 else []:
                ax.plot(curve[key], curve["value"], color=f"C{number}", alpha=0.2, linewidth=0.8)
        ends = outcome.finals(outcome.study.baseline)
        ax.axhline(ends.median, color="C0", linewidth=0.8, linestyle=":")
        ax.set_xlabel(label)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(f"validation {metric.label}")
    axes[0].set_ylim(*_limits(outcome))
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def spread(values: Spread | None, digits: int) -> str:
    """A median with its range, a dash for what was not reached by all seeds."""
    if values is None:
        return "-"
    middle = f"{values.median:.{digits}f}"
    if values.least == values.most:
        return middle
    return f"{middle} ({values.least:.{digits}f} to {values.most:.{digits}f})"


def _row(outcome: Outcome, contender: Contender, extra: Sequence[str]) -> list[str]:
    runs = outcome.of(contender)
    rate, steps = f"{outcome.chosen[contender.name]:g}", str(runs[0].job.schedule)
    cells = [contender.name, rate, steps, spread(outcome.finals(contender), 4)]
    cells += [spread(Spread.of(run.records[-1][key] for run in runs), 2) for key in extra]
    cells.append(f"{1e3 * np.median([run.records[-1]['seconds'] / run.job.schedule for run in runs]):.0f}")
    figures = {(f.contender, f.baseline): f for f in outcome.figures()}
    for baseline in outcome.study.contenders[: max(1, len(outcome.study.contenders) - 1)]:
        figure = figures.get((contender.name, baseline.name))
        cells += ["1", "1"] if figure is None else [spread(figure.steps, 2), spread(figure.seconds, 2)]
    return cells


def _grid_lines(outcome: Outcome) -> list[str]:
    """What each grid of learning rates gave."""
    lines = []
    for contender in outcome.study.contenders:
        tried = [result for result in outcome.search if result.job.contender == contender]
        if len(tried) < 2:
            continue
        tried.sort(key=lambda result: result.job.lr)
        ends = ", ".join(f"{result.job.lr:g}: {result.final:.4f}" for result in tried)
        lines.append(f"- {contender.name}'s rates: {ends}.")
    return lines


def _end(result: Result) -> dict[str, Any]:
    job, last = result.job, result.records[-1]
    return {
        "contender": job.contender.name,
        "lr": job.lr,
        "seed": job.seed,
        "schedule": job.schedule,
        "final": result.final,
        "seconds": last["seconds"],
        **{key: value for key, value in last.items() if key.startswith(("val_", "final_"))},
    }


def _curve(result: Result) -> dict[str, list[float]]:
    found = [record for record in result.records if result.metric.key in record]
    return {
        "step": [record["step"] for record in found],
        "seconds": [record["seconds"] for record in found],
        "value": [record[result.metric.key] for record in found],
    }


def _limits(outcome: Outcome) -> tuple[float, float]:
    """A range of the metric that shows the second half of the runs."""
    values = np.concatenate([_curve(run)["value"][len(_curve(run)["value"]) // 6 :] for run in outcome.runs])
    low, high = float(values.min()), float(values.max())
    return low - 0.03 * (high - low), high + 0.03 * (high - low)
