"""What a study's results look like: a table, and curves over steps and over seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # Training machines have no display.

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.evidence.figures import Spread
from benchmarks.evidence.outcome import Outcome, curve
from benchmarks.evidence.protocol import Contender, Study


def to_markdown(outcome: Outcome) -> str:
    """The study's section of the results."""
    study, metric = outcome.study, outcome.runs[0].metric
    seeds = len(outcome.protocol.seeds)
    extra = sorted(key for key in outcome.runs[0].records[-1] if key.startswith("final_"))
    header = ["optimizer", "rate", "steps", metric.label, *(key.removeprefix("final_") for key in extra), "ms a step"]
    if study.alike:
        header.append(f"less {study.baseline.name}'s")
        legend = f"The last column: what it ends at, less what {study.baseline.name} of the same seed ends at."
    else:
        header += [name for other in _others(study) for name in (f"steps to {other.name}'s end", "seconds")]
        legend = "Steps and seconds to another's end are parts of what that one took to be as good for the first time."
    rows = [_row(outcome, contender, extra) for contender in study.contenders]
    return "\n".join(
        [
            f"## {study.title}",
            "",
            f"`{' '.join((f'launch/{study.program}', *study.arguments))}`, {seeds} seed{'s' if seeds > 1 else ''}. "
            f"{legend}",
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
            curves = [curve(run) for run in outcome.of(contender)]
            middle = {k: np.median([each[k] for each in curves], axis=0) for k in ("step", "seconds", "value")}
            ax.plot(middle[key], middle["value"], color=f"C{number}", label=contender.name)
            for each in curves if len(curves) > 1 else []:
                ax.plot(each[key], each["value"], color=f"C{number}", alpha=0.2, linewidth=0.8)
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


def _others(study: Study) -> Sequence[Contender]:
    """Those whose ends the contenders are measured by: all but the last."""
    return study.contenders[: max(1, len(study.contenders) - 1)]


def _row(outcome: Outcome, contender: Contender, extra: Sequence[str]) -> list[str]:
    runs = outcome.of(contender)
    rate, steps = f"{outcome.chosen[contender.name]:g}", str(runs[0].job.schedule)
    cells = [contender.name, rate, steps, spread(outcome.finals(contender), 4)]
    cells += [spread(Spread.of(run.records[-1][key] for run in runs), 2) for key in extra]
    cells.append(f"{1e3 * np.median([run.records[-1]['seconds'] / run.job.schedule for run in runs]):.0f}")
    if outcome.study.alike:
        return [*cells, spread(outcome.beside_baseline(contender), 4)]
    figures = {(f.contender, f.baseline): f for f in outcome.figures()}
    for baseline in _others(outcome.study):
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


def _limits(outcome: Outcome) -> tuple[float, float]:
    """A range of the metric that shows the second half of the runs."""
    values = np.concatenate([curve(run)["value"][len(curve(run)["value"]) // 6 :] for run in outcome.runs])
    low, high = float(values.min()), float(values.max())
    return low - 0.03 * (high - low), high + 0.03 * (high - low)
