"""Compares runs: one picture of their losses, and how soon each reached the baseline's final loss.

python launch/compare.py runs/adamw runs/polar
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from metric import Metric
from plots import plot_losses, smoothing_window, trailing_mean
from recorder import Record, read_metrics

ADAM_TYPES = ("adam", "adamw")

# What a run is judged by that does not say so itself.
LOSS = Metric("val_loss", "loss", "lower")


@dataclass(frozen=True)
class Run:
    """A run's records, the type of its optimizer in lower case ("" where that isn't known), and its metric."""

    name: str
    optimizer: str
    records: Sequence[Record]
    metric: Metric = LOSS

    @property
    def final_loss(self) -> float:
        """The mean training loss over the last steps."""
        return float(
            trailing_mean([record["loss"] for record in self.records], smoothing_window(len(self.records)))[-1]
        )

    @property
    def validation(self) -> list[Record]:
        """The records that have the validation metric."""
        return [record for record in self.records if self.metric.key in record]


@dataclass(frozen=True)
class Reached:
    """When a run got as low as the baseline ended, in parts of what the baseline took."""

    steps: int
    seconds: float
    of_steps: float
    of_seconds: float

    def __str__(self) -> str:
        return (
            f"step {self.steps} = {self.of_steps:.2f} x its steps, "
            f"{self.seconds:.0f} s = {self.of_seconds:.2f} x its seconds"
        )


def load_run(path: Path) -> Run:
    """Reads a run's folder.

    Raises:
        ValueError: where it has no metrics.
    """
    try:
        records = read_metrics(path)
    except OSError as error:
        raise ValueError(f"{path}: not the folder of a run: {error}") from None
    if not records:
        raise ValueError(f"{path}: no step was recorded")
    config = path / "config.json"
    known = json.loads(config.read_text()) if config.exists() else {}
    optimizer = known.get("deepspeed", {}).get("optimizer", {}).get("type", "").lower()
    metric = Metric(**known["metric"]) if "metric" in known else LOSS
    return Run(path.resolve().name, optimizer, records, metric)


def choose_baseline(runs: Sequence[Run]) -> Run:
    """The one run that used Adam or AdamW; where none or several did, the first run."""
    adam = [run for run in runs if run.optimizer in ADAM_TYPES]
    return adam[0] if len(adam) == 1 else runs[0]


def reached_training_loss(run: Run, baseline: Run) -> Reached | None:
    """When the run's trailing mean, as wide as the baseline's, got down to the baseline's final loss."""
    window = smoothing_window(len(baseline.records))
    if len(run.records) < window:
        return None
    means = trailing_mean([record["loss"] for record in run.records], window)
    return _reached(run.records[window - 1 :], means.tolist(), LOSS, baseline.final_loss, baseline)


def reached_validation_metric(run: Run, baseline: Run) -> Reached | None:
    """At which of its validations the run was as good as the baseline at its last one."""
    if not baseline.validation:
        return None
    key = run.metric.key
    values = [record[key] for record in run.validation]
    return _reached(run.validation, values, run.metric, baseline.validation[-1][key], baseline)


def _reached(
    records: Sequence[Record], values: Sequence[float], metric: Metric, target: float, baseline: Run
) -> Reached | None:
    end = baseline.records[-1]
    for record, value in zip(records, values, strict=True):
        if metric.reached(value, target):
            step, seconds = record["step"], record["seconds"]
            return Reached(step, seconds, step / end["step"], seconds / end["seconds"])
    return None


def report(runs: Sequence[Run], baseline: Run) -> str:
    """The table of the runs' ends, and below it when each reached the baseline's."""
    width = max(len("run"), *(len(run.name) for run in runs))
    metric = baseline.metric
    column = f"val {metric.name}"
    lines = [f"{'run':{width}}  {'train loss':>10}  {column:>{len(column)}}  {'steps':>6}  {'seconds':>8}"]
    for run in runs:
        end, loss = run.records[-1], run.final_loss
        validation = f"{run.validation[-1][metric.key]:.4f}" if run.validation else "-"
        lines.append(
            f"{run.name:{width}}  {loss:10.4f}  {validation:>{len(column)}}  {end['step']:6}  {end['seconds']:8.1f}"
        )
    window = smoothing_window(len(baseline.records))
    lines.append(f"\ntrain loss: the mean over {window} steps. Where {baseline.name} ended was reached by")
    for run in runs:
        if run is not baseline:
            for kind, reached in (
                ("train", reached_training_loss(run, baseline)),
                ("val", reached_validation_metric(run, baseline)),
            ):
                lines.append(f"{run.name:{width}}  {kind:5}  {reached or 'never'}")
    return "\n".join(lines)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of runs")
    parser.add_argument(
        "--baseline", type=Path, help="the run to compare with (default: the one with AdamW, or the first)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/compare.png"), help="the picture (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    paths = list(dict.fromkeys([*options.runs, *([options.baseline] if options.baseline else [])]))
    try:
        runs = [load_run(path) for path in paths]
    except ValueError as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return 1
    if len({run.metric for run in runs}) > 1:
        print("compare: error: the runs are of different tasks", file=sys.stderr)
        return 1
    baseline = runs[paths.index(options.baseline)] if options.baseline else choose_baseline(runs)
    print(report(runs, baseline))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    plot_losses({run.name: run.records for run in runs}, options.output)
    print(f"\n{options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
