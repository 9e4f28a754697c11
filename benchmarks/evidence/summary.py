"""One table over all studies, from the JSON files that their runs left."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.evidence.figures import Spread
from benchmarks.evidence.protocol import Study
from benchmarks.evidence.report import spread


def write_summary(folder: Path, studies: Iterable[Study]) -> None:
    """Writes README.md of a folder of results, for those of the studies that it has."""
    files = [folder / f"{study.name}.json" for study in studies]
    (folder / "README.md").write_text(summary([json.loads(file.read_text()) for file in files if file.exists()]))


def summary(outcomes: Iterable[Mapping[str, Any]]) -> str:
    """Every contender against its study's baseline, given what `report.to_json` made of each study."""
    header = ("task", "judged by", "optimizer", "rate", "steps", "ends at", "fewer steps", "steps", "seconds")
    outcomes = list(outcomes)
    rows = [row for outcome in outcomes if not outcome["alike"] for row in _rows(outcome)]
    options = [f"- [{outcome['title']}]({outcome['study']}.md)" for outcome in outcomes if outcome["alike"]]
    return "\n".join(
        [
            "# Results",
            "",
            "Medians over seeds, with the smallest and the largest. *Fewer steps*: how many times fewer an optimizer",
            "needs to where the task's first optimizer ends; then the steps and the seconds of training to there, in",
            "parts of what that one takes to be there for the first time. A dash: some seed's run did not get there",
            "within its schedule.",
            "",
            "| " + " | ".join(header) + " |",
            "|" + "---|" * len(header),
            *("| " + " | ".join(row) + " |" for row in rows),
            "",
            *(["Settings that should change little:", "", *options, ""] if options else []),
        ]
    )


def _rows(outcome: Mapping[str, Any]) -> Iterable[tuple[str, ...]]:
    names = list(outcome["chosen"])
    baseline = names[0]
    against = {figure["contender"]: figure for figure in outcome["figures"] if figure["baseline"] == baseline}
    for name in names:
        runs = [run for run in outcome["runs"] if run["contender"] == name]
        first = name == baseline
        figure = against.get(name, {})
        yield (
            f"[{outcome['title']}]({outcome['study']}.md)" if first else "",
            outcome["metric"]["label"] if first else "",
            name,
            f"{outcome['chosen'][name]:g}",
            str(runs[0]["schedule"]),
            spread(Spread.of(run["final"] for run in runs), 4),
            *("1" if first else _cell(figure[key]) for key in ("faster", "steps", "seconds")),
        )


def _cell(values: Mapping[str, float] | None) -> str:
    return spread(None if values is None else Spread(**values), 2)
