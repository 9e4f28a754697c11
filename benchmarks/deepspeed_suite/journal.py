"""The folder in which a run keeps what its tests came to, so that a later call goes on where it stopped."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from benchmarks.deepspeed_suite.outcome import Record


class JournalError(ValueError):
    """A folder that holds another run; the message says what differs."""


class Journal:
    """Records of tests, one a line, in `records.jsonl`; of several of one test the last one counts."""

    def __init__(self, folder: Path, run: dict[str, object]) -> None:
        """Takes up a folder, or begins it.

        Args:
            run: what all records of a folder have in common: versions and settings.

        Raises:
            JournalError: if the folder holds records of something else.
        """
        folder.mkdir(parents=True, exist_ok=True)
        about = folder / "run.json"
        if about.exists():
            kept = json.loads(about.read_text())
            for key in run:
                if kept.get(key) != run[key]:
                    raise JournalError(
                        f"--results {folder} holds a run with {key} = {kept.get(key)!r}, not {run[key]!r}: name "
                        "another folder, or remove it"
                    )
        else:
            about.write_text(json.dumps(run, indent=1) + "\n")
        self._path = folder / "records.jsonl"
        self._lock = threading.Lock()
        self.records: dict[str, Record] = {}
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                self._take(_from_line(line))

    def add(self, record: Record) -> None:
        """Takes a record down; called from several threads."""
        with self._lock:
            self._take(record)
            with self._path.open("a") as file:
                file.write(json.dumps(asdict(record)) + "\n")

    def lacking(self, tests: Iterable[str]) -> list[str]:
        return [test for test in tests if test not in self.records]

    def _take(self, record: Record) -> None:
        self.records[record.test] = record


def _from_line(line: str) -> Record:
    content = json.loads(line)
    return Record(**{**content, "refusals": tuple(content["refusals"])})
