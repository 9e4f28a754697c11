"""A run's metrics.jsonl: one JSON object per step, kept consistent over stops and resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from clock import Spent

METRICS = "metrics.jsonl"

Record = dict[str, Any]


def read_metrics(run: Path) -> list[Record]:
    """The records of a run, oldest first; a last line that a kill cut short is left out.

    Raises:
        FileNotFoundError: where the run has no metrics.
    """
    records = []
    for line in (run / METRICS).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class Recorder:
    """Appends a run's records to its metrics.jsonl, from the step on at which the run starts or resumes."""

    def __init__(self, run: Path, step: int) -> None:
        """Drops records of steps after `step`, which the run is about to repeat."""
        self._path = run / METRICS
        kept = [record for record in read_metrics(run) if record["step"] <= step] if self._path.exists() else []
        self._replace(kept)
        last = kept[-1] if kept else {}
        self._seconds: float = last.get("seconds", 0.0)
        self._processor_seconds: float = last.get("processor_seconds", 0.0)

    def _replace(self, records: list[Record]) -> None:
        scratch = self._path.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(record) + "\n" for record in records))
        os.replace(scratch, self._path)

    def write(self, record: Record, spent: Spent) -> None:
        """Appends one step's record and the training time so far, in which evaluation and saving don't count.

        Args:
            spent: what the step took.
        """
        self._seconds += spent.wall
        self._processor_seconds += spent.processor
        times = {"seconds": round(self._seconds, 4), "processor_seconds": round(self._processor_seconds, 4)}
        with self._path.open("a") as file:
            file.write(json.dumps({**record, **times}) + "\n")
