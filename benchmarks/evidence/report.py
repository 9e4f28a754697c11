"""What a study's results look like: tables, and curves over steps and over seconds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # Training machines have no display.

import matplotlib.pyplot as plt
import numpy as np

from benchmarks.evidence.figures import SHOWN, Crossing, Level, Spread, Within
from benchmarks.evidence.outcome import Figure, Outcome, curve
from benchmarks.evidence.protocol import Contender
from benchmarks.evidence.search import Settings


def to_markdown(outcome: Outcome) -> str:
    """The study's section of the results."""
    study = outcome.study
    lines = [f"## {study.title}", "", *_about(outcome), ""]
    if study.alike:
        lines += [*_alike(outcome), ""]
    else:
        lines += [*_main_table(outcome), "", *_schedules(outcome), ""]
    lines += [f"![{outcome.metric.label} over steps and over seconds]({study.name}.png)", "", *_settings(outcome)]
    if outcome.trials:
        lines += ["", *_trials(outcome)]
    return "\n".join([*lines, ""])


def draw(outcome: Outcome, path: Path) -> None:
    """The validation metric on the baseline's schedule, over steps and seconds: medians, and every seed faintly."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    for ax, key, label in zip(axes, ("step", "seconds"), ("step", "processor seconds of training"), strict=True):
        for number, contender in enumerate(outcome.study.contenders):
            curves = [curve(run) for run in outcome.of(contender)]
            shortest = min(len(each[key]) for each in curves)  # a seed that diverged ends early
            if shortest:
                middle = {k: np.median([each[k][:shortest] for each in curves], axis=0) for k in (key, "value")}
                ax.plot(middle[key], middle["value"], color=f"C{number}", label=contender.name)
            for each in curves if len(curves) > 1 else []:
                ax.plot(each[key], each["value"], color=f"C{number}", alpha=0.2, linewidth=0.8)
        ends = outcome.finals(outcome.study.baseline)
        ax.axhline(ends.median, color="C0", linewidth=0.8, linestyle=":")
        ax.set_xlabel(label)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel(f"validation {outcome.metric.label}")
    axes[0].set_ylim(*_limits(outcome))
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def spread(values: Spread, digits: int) -> str:
    """A median with its range."""
    if math.isnan(values.median):
        return "diverged"
    middle = f"{values.median:.{digits}f}"
    if values.least == values.most:
        return middle
    return f"{middle} ({values.least:.{digits}f} to {values.most:.{digits}f})"


def crossed(figure: Figure, quantity: str) -> str:
    """Where a contender ends as the baseline does, in `quantity` ("steps" or "seconds"), with one standard error."""
    middle = _length(figure.crossing, quantity)
    if figure.least is None or figure.most is None or figure.crossing.kind != "at":
        return middle
    return f"{middle} ({_length(figure.least, quantity)} to {_length(figure.most, quantity)})"


def passed(found: Within, quantity: str) -> str:
    """Where a run passes the baseline's end; where not all seeds do, how many do and where each ends."""
    values: Spread | None = getattr(found, quantity)
    if values is None:
        return f"{found.reached} of {found.seeds}, ends at {ends(found.ends)}"
    return spread(values, 2)


def ends(values: Iterable[float]) -> str:
    """Where runs end, one after another."""
    return ", ".join("diverged" if math.isnan(value) else f"{value:.4f}" for value in values)


def commits(outcome: Outcome) -> str:
    return ", ".join(outcome.commits) or "unknown"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table's lines."""
    lines = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    return [lines[0], "|" + "---|" * len(header), *lines[1:]]


def _length(found: Crossing, quantity: str) -> str:
    value = f"{getattr(found, quantity):.2f}"
    return value if found.kind == "at" else f"{found.kind} {value}"


def _about(outcome: Outcome) -> list[str]:
    study, protocol, tuning = outcome.study, outcome.protocol, outcome.study.tuning
    seeds, sigma = ", ".join(map(str, protocol.seeds)), outcome.sigma
    lines = [
        f"`{' '.join((f'launch/{study.program}', *study.arguments))}`, {protocol.steps(study)} steps, judged by "
        f"`{study.corpus}`, seed{'s' if len(protocol.seeds) > 1 else ''} {seeds}. Run by commit {commits(outcome)}.",
    ]
    if tuning is not None:
        job = outcome.trials[0].job if outcome.trials else None
        steps = job.schedule if job else tuning.steps
        carried = f", from what `{tuning.after}` chose on" if tuning.after else ""
        lines.append(
            f"Settings were chosen on `{tuning.corpus}`, seed {protocol.tuning_seed}, {steps} steps: at most "
            f"{_trial_count(protocol.budget(tuning))} for every optimizer{carried}."
        )
    if sigma is not None:
        lines.append(
            f"Two seeds' ends differ by a sigma of {sigma.value:.2g} ({sigma.freedom} degrees of freedom, pooled over "
            "optimizers and schedules)."
        )
    return lines


def _main_table(outcome: Outcome) -> list[str]:
    study, metric = outcome.study, outcome.metric
    first, second = study.baseline.name, study.contenders[1].name if len(study.contenders) > 1 else None
    extra = sorted({key for run in outcome.runs for key in run.records[-1] if key.startswith("final_")})
    header = ["optimizer", metric.label, *(key.removeprefix("final_") for key in extra), "ms a step"]
    header += [f"steps to {first}'s end", "seconds", "shown at", "within one run: steps", "seconds"]
    header += [f"steps to {second}'s end within one run"] if second else []
    figures = {(figure.contender, figure.baseline): figure for figure in outcome.figures()}
    rows = []
    for contender in study.contenders:
        row = [contender.name, spread(outcome.finals(contender), 4)]
        row += [_extra(outcome, contender, key) for key in extra]
        row.append(_pace(outcome, contender))
        figure = figures.get((contender.name, first))
        if figure is None:
            row += ["1", "1", "", "1", "1"]
        else:
            sure = "not shown" if figure.shown is None else f"{figure.shown:g}"
            row += [crossed(figure, "steps"), crossed(figure, "seconds"), sure]
            row += [passed(figure.within, "steps"), passed(figure.within, "seconds")]
        if second:
            other = figures.get((contender.name, second))
            row.append("1" if other is None else passed(other.within, "steps"))
        rows.append(row)
    legend = (
        f"Steps to {first}'s end: the length of a schedule of its own on which an optimizer ends where {first} does, "
        f"and the seconds of such a run, in parts of {first}'s; in brackets one standard error to each side; below the "
        "shortest schedule that was run, or above the longest. Shown at: the shortest of its schedules on which its "
        f"mean is better by z = {SHOWN:g}. Within one run: the first validation on the same schedule that is as good "
        "as another's end, in parts of what that one took."
    )
    return [*table(header, rows), "", legend]


def _schedules(outcome: Outcome) -> list[str]:
    """Every schedule of every contender."""
    name = outcome.study.baseline.name
    header = [f"schedule in parts of {name}'s", "steps", "ends at", f"as good as {name}'s median", "z", "seconds"]
    rows = [
        [contender.name, *_level(level)]
        for contender in outcome.study.contenders[1:]
        for level in outcome.figure(contender, outcome.study.baseline).levels
    ]
    return table(["optimizer", *header], rows)


def _level(level: Level) -> list[str]:
    z = "" if level.z is None else f"{level.z:.1f}"
    reached = f"{level.reached} of {level.seeds}"
    return [f"{level.horizon:g}", str(level.steps), ends(level.ends), reached, z, spread(level.seconds, 2)]


def _alike(outcome: Outcome) -> list[str]:
    name = outcome.study.baseline.name
    header = ["optimizer", outcome.metric.label, "ms a step", f"less {name}'s of the same seed"]
    return table(
        header,
        [
            [
                contender.name,
                spread(outcome.finals(contender), 4),
                _pace(outcome, contender),
                spread(outcome.beside_baseline(contender), 4),
            ]
            for contender in outcome.study.contenders
        ],
    )


def _extra(outcome: Outcome, contender: Contender, key: str) -> str:
    return spread(Spread.of(run.records[-1].get(key, math.nan) for run in outcome.of(contender)), 2)


def _pace(outcome: Outcome, contender: Contender) -> str:
    runs = outcome.of(contender)
    return f"{1e3 * np.median([run.seconds / max(1, run.records[-1]['step']) for run in runs]):.0f}"


def _settings(outcome: Outcome) -> list[str]:
    """What every contender runs with, and which of it lies at the end of what it could have been."""
    lines = ["Settings (warm-ups in parts of the schedule):", ""]
    for contender in outcome.study.contenders:
        chosen = outcome.chosen[contender.name]
        edges = [axis.key for axis in contender.axes if chosen[axis.key] in (axis.values[0], axis.values[-1])]
        edge = f"; at an end of what it may be: {', '.join(f'`{key}`' for key in edges)}" if edges else ""
        lines.append(f"- {contender.name} (`{contender.type}`): {_named(chosen)}{edge}.")
    return lines


def _trials(outcome: Outcome) -> list[str]:
    """All that was tried: the first trial's settings, then what each other changed of them."""
    lines = ["<details><summary>All trials</summary>", ""]
    for contender in outcome.study.contenders:
        tried = outcome.trials_of(contender)
        best = min(tried, key=lambda trial: trial.score, default=None)
        lines.append(f"- {contender.name}, {_trial_count(len(tried))}:")
        for trial in tried:
            first, own = tried[0].job.settings, trial.job.settings
            changed = {key: value for key, value in own.items() if value != first[key]}
            end = "diverged" if trial.diverged else f"{trial.final:.4f}"
            what = _named(changed) if changed else "the start, " + _named({a.key: own[a.key] for a in contender.axes})
            lines.append(f"  - {what}: {end}{', chosen' if trial is best else ''}")
    return [*lines, "", "</details>"]


def _trial_count(count: int) -> str:
    return f"{count} trial{'' if count == 1 else 's'}"


def _named(settings: Settings) -> str:
    return ", ".join(
        f"`{key}` {value:g}" if isinstance(value, float) else f"`{key}` {value}" for key, value in settings.items()
    )


def _limits(outcome: Outcome) -> tuple[float, float]:
    """A range of the metric that shows the second half of the runs."""
    values = [value for run in outcome.runs for value in curve(run)["value"][len(curve(run)["value"]) // 6 :]]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    margin = 0.03 * (high - low) or 1e-3
    return low - margin, high + margin
