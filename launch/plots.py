"""Pictures of loss curves: the raw losses faint, a trailing mean over them, validation losses as points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # Training machines have no display.

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes

from recorder import Record

# The trailing mean spans this part of a run, and at least this many steps.
SMOOTHED_PART = 0.05
SMOOTHED_STEPS = 10


def smoothing_window(steps: int) -> int:
    """How many steps the trailing mean spans in a run of `steps`."""
    return max(1, min(steps, max(SMOOTHED_STEPS, round(steps * SMOOTHED_PART))))


def trailing_mean(values: Sequence[float], window: int) -> npt.NDArray[np.float64]:
    """The mean over the last `window` values at each position from the first full window on.

    Returns:
        float64 [len(values) - window + 1].
    """
    return np.convolve(np.asarray(values, np.float64), np.full(window, 1 / window), mode="valid")


def plot_losses(runs: Mapping[str, Sequence[Record]], path: Path) -> None:
    """Draws the runs' losses over steps and over seconds of training into one PNG."""
    figure, (over_steps, over_seconds) = plt.subplots(1, 2, figsize=(13, 5), sharey=True, layout="constrained")
    for axes, key, label in ((over_steps, "step", "step"), (over_seconds, "seconds", "seconds of training")):
        for number, (name, records) in enumerate(runs.items()):
            _draw(axes, name, records, key, f"C{number}")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    over_steps.set_ylabel("loss")
    over_steps.set_ylim(_limits([record["loss"] for records in runs.values() for record in records]))
    over_steps.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw(axes: Axes, name: str, records: Sequence[Record], key: str, colour: str) -> None:
    places = [record[key] for record in records]
    losses = [record["loss"] for record in records]
    window = smoothing_window(len(losses))
    axes.plot(places, losses, color=colour, alpha=0.2, linewidth=0.8)
    axes.plot(places[window - 1 :], trailing_mean(losses, window), color=colour, label=name)
    validated = [record for record in records if "val_loss" in record]
    axes.plot(
        [record[key] for record in validated],
        [record["val_loss"] for record in validated],
        "o",
        color=colour,
        markersize=4,
        label=f"{name}, validation",
    )


def _limits(losses: Sequence[float]) -> tuple[float, float]:
    """A range that shows where the curves differ, whatever height they start from."""
    finite = np.asarray(losses)[np.isfinite(losses)]
    low, high = np.quantile(finite, [0.0, 0.95]) if finite.size else (0.0, 1.0)
    margin = 0.05 * (high - low) + 1e-3
    return low - margin, high + margin
