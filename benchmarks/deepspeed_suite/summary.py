"""The table of a run: how many tests came to what, and each that did not pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.deepspeed_suite.outcome import BAD, Expected, Kind, Record, Suite, classify
from benchmarks.report import table

_NOT_LISTED = (Kind.PASSED, Kind.SKIPPED, Kind.UNCONCERNED)
_LONGEST = 220


@dataclass(frozen=True)
class Verdict:
    """A test's record beside what was expected of it."""

    record: Record
    kind: Kind
    expected: Expected | None


def judge(records: Sequence[Record], suite: Suite) -> list[Verdict]:
    verdicts = []
    for record in records:
        expected = suite.expectation(record.test)
        verdicts.append(Verdict(record, classify(record, expected), expected))
    return verdicts


def failed(verdicts: Sequence[Verdict]) -> bool:
    return any(verdict.kind in BAD for verdict in verdicts)


def to_text(verdicts: Sequence[Verdict], selected: int, uncollected: Mapping[str, str], versions: str) -> str:
    """The table as text: counts by file, then the tests that did not pass, those that count against us last."""
    by_kind = {kind: [verdict for verdict in verdicts if verdict.kind is kind] for kind in Kind}
    alone = Counter(_essence(v.record.text) for v in by_kind[Kind.UNCONCERNED] if v.record.end != "passed")
    passed = by_kind[Kind.PASSED]
    parts = [
        f"DeepSpeed's tests with Shampoo in Adam's place, {versions}: {len(verdicts)} of {selected} run",
        _counts(verdicts),
        _listing("could not be collected", (f"{file}: {_essence(text)}" for file, text in uncollected.items())),
        _listing("failed before Shampoo was asked for", (f"{count} by {text}" for text, count in alone.most_common())),
        _listing("passed, but no step was taken", (v.record.test for v in passed if not v.record.stepped)),
        _listing("passed, though listed as a difference", (v.record.test for v in passed if v.expected is not None)),
        *(_listing(kind.value, map(_line, by_kind[kind])) for kind in Kind if kind not in _NOT_LISTED),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _counts(verdicts: Sequence[Verdict]) -> str:
    total = Counter(verdict.kind for verdict in verdicts)
    shown = [kind for kind in Kind if kind in BAD or total[kind]]
    rows = []
    for file in dict.fromkeys(_file(verdict.record) for verdict in verdicts):
        counts = Counter(verdict.kind for verdict in verdicts if _file(verdict.record) == file)
        rows.append([file, *(str(counts[kind] or "") for kind in shown)])
    return table(["tests", *(kind.value for kind in shown)], [*rows, ["all", *(str(total[kind]) for kind in shown)]])


def _listing(title: str, lines: Iterable[str]) -> str:
    shown = [f"  {line}" for line in lines]
    return "\n".join([f"{title}:", *shown]) if shown else ""


def to_json(
    verdicts: Sequence[Verdict], selected: int, uncollected: Mapping[str, str], versions: str
) -> dict[str, object]:
    counts = Counter(verdict.kind for verdict in verdicts)
    return {
        "about": versions,
        "selected": selected,
        "run": len(verdicts),
        "counts": {kind.value: counts[kind] for kind in Kind},
        "uncollected": dict(uncollected),
        "tests": [
            {
                "test": verdict.record.test,
                "outcome": verdict.kind.value,
                "seconds": verdict.record.seconds,
                "stepped": verdict.record.stepped,
                "text": "" if verdict.kind is Kind.PASSED else verdict.record.text,
            }
            for verdict in verdicts
        ],
    }


def _file(record: Record) -> str:
    return record.test.partition("::")[0].removeprefix("unit/")


def _line(verdict: Verdict) -> str:
    record, expected = verdict.record, verdict.expected
    if expected is not None and verdict.kind in (Kind.REFUSED, Kind.DIFFERENT, Kind.NOT_REFUSED):
        return f"{record.test}: {expected.says or expected.why}"
    return f"{record.test}: {record.end} after {record.seconds:.0f} s: {_essence(record.text)}"


def _essence(text: str) -> str:
    """What was raised, out of a traceback: the last line that pytest marks as an error's, or that names one."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    marked = [line.removeprefix("E").strip() for line in lines if line.startswith("E   ")]
    named = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception", "Refused"))]
    chosen = (marked[:1] or named[-1:] or lines[-1:] or ["(nothing was raised)"])[0]
    return chosen[:_LONGEST]
