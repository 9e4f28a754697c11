"""What a run is judged by."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """A validation metric.

    Attributes:
        key: its name in the run's records, "val_" first.
        label: as a picture's axis and a table's head have it.
        better: which way it improves.
    """

    key: str
    label: str
    better: Literal["lower", "higher"]

    @property
    def name(self) -> str:
        """Its name in a sentence that says "validation" already."""
        return self.key.removeprefix("val_")

    def reached(self, value: float, target: float) -> bool:
        """Whether `value` is as good as `target`."""
        return value <= target if self.better == "lower" else value >= target
