"""What a test came to, and which of it is as the list expects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

LIST = Path(__file__).with_name("suite.json")


class Kind(Enum):
    """The outcomes, in the order of the table; the last two make the run fail."""

    PASSED = "passed"
    REFUSED = "expected refusal"
    DIFFERENT = "expected difference"
    ADAM_TOO = "fails with Adam too"
    UNCONCERNED = "not concerned"
    SKIPPED = "skipped by DeepSpeed"
    NOT_REFUSED = "expected refusal did not come"
    FAILED = "FAILED"


BAD = (Kind.NOT_REFUSED, Kind.FAILED)


@dataclass(frozen=True)
class Record:
    """What was seen of one test.

    Attributes:
        end: "passed", "failed", "skipped", "timed out" or "died".
        text: the end of what was raised, or why it was skipped.
        asked: an engine was to have Adam, and Shampoo was put in its place.
        built, stepped: an engine had Shampoo; it finished a step.
        refusals: the messages by which Shampoo refused an engine.
        with_adam: how the test ended with Adam itself, where that was tried.
    """

    test: str
    end: str
    text: str = ""
    seconds: float = 0.0
    asked: bool = False
    built: bool = False
    stepped: bool = False
    refusals: tuple[str, ...] = ()
    with_adam: str | None = None


@dataclass(frozen=True)
class Expected:
    """A test, or several by a pattern, that Shampoo is not to pass.

    Attributes:
        test: a test's id without its parameters' part, for all of them, or with it; `*` stands for anything.
        says: part of the message by which Shampoo refuses it; empty for a difference.
        why: for a difference, why the test asks for Adam itself.
    """

    test: str
    says: str = ""
    why: str = ""

    def __post_init__(self) -> None:
        if bool(self.says) == bool(self.why):
            raise ValueError(f"{LIST.name}: {self.test}: must have either 'says' (a refusal) or 'why' (a difference)")

    def means(self, test: str) -> bool:
        pattern = ".*".join(re.escape(part) for part in self.test.split("*"))
        return re.fullmatch(pattern + r"(\[.*\])?", test, re.DOTALL) is not None


@dataclass(frozen=True)
class Suite:
    """The list: which of DeepSpeed's test files are run, the most telling first, and what is expected of them."""

    files: tuple[str, ...]
    expected: tuple[Expected, ...] = field(default=())

    def expectation(self, test: str) -> Expected | None:
        return next((entry for entry in self.expected if entry.means(test)), None)


def read_suite(path: Path = LIST) -> Suite:
    """Reads a list.

    Raises:
        ValueError: for an entry that is neither a refusal nor a difference.
        TypeError: for a key that nobody reads.
    """
    content: Mapping[str, Any] = json.loads(path.read_text())
    return Suite(tuple(content["files"]), tuple(Expected(**entry) for entry in content["expected"]))


def classify(record: Record, expected: Expected | None) -> Kind:
    """What a test's end means, given what is expected of it."""
    if record.end == "skipped":
        return Kind.SKIPPED
    refused = expected is not None and bool(expected.says)
    came = refused and any(expected.says in text for text in (*record.refusals, record.text))  # type: ignore[union-attr]
    if came:
        return Kind.REFUSED
    if not record.asked:
        return Kind.UNCONCERNED
    if record.end == "passed":
        if refused:
            return Kind.NOT_REFUSED
        return Kind.PASSED if record.built else Kind.UNCONCERNED
    if expected is not None and expected.why:
        return Kind.DIFFERENT
    return Kind.ADAM_TOO if record.with_adam not in (None, "passed", "skipped") else Kind.FAILED


def merge(notes: Iterable[Mapping[str, Any]]) -> list[Record]:
    """Records of the tests that ended, from what the processes noted, in order of their beginning."""
    by_test: dict[str, list[Mapping[str, Any]]] = {}
    for note in notes:
        by_test.setdefault(note["test"], []).append(note)
    return [_record(test, found) for test, found in by_test.items() if any(n["event"] == "ended" for n in found)]


def _record(test: str, notes: Sequence[Mapping[str, Any]]) -> Record:
    events = {note["event"] for note in notes}
    end = next(note for note in reversed(notes) if note["event"] == "ended")
    raised = [note["text"] for note in notes if note["event"] == "raised"]
    text = end["text"]
    if raised and raised[0] not in text:
        text = f"{text}\na rank had raised:\n{raised[0]}"
    return Record(
        test,
        end["outcome"],
        text,
        end["seconds"],
        asked="asked" in events,
        built="built" in events,
        stepped="stepped" in events,
        refusals=tuple(dict.fromkeys(note["message"] for note in notes if note["event"] == "refused")),
    )
