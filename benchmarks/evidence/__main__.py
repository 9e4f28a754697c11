"""Runs studies under a protocol and writes their results: `python -m benchmarks.evidence --protocol full`.

Jobs run one to a core, root threads included. Those that are done already are only read, so a call that was killed
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from benchmarks.evidence.execution import carry_out
from benchmarks.evidence.jobs import Cores, JobError
from benchmarks.evidence.outcome import Outcome, from_json, to_json
from benchmarks.evidence.protocol import FULL, SMALL, Protocol, Study
from benchmarks.evidence.report import draw, to_markdown
from benchmarks.evidence.search import Settings
from benchmarks.evidence.studies import STUDIES
from benchmarks.evidence.summary import summary

PROTOCOLS = {protocol.name: protocol for protocol in (SMALL, FULL)}


def main() -> None:
    args = parse_arguments()
    protocol = PROTOCOLS[args.protocol]
    output = args.output / protocol.name
    output.mkdir(parents=True, exist_ok=True)
    for study in STUDIES:
        if args.only is not None and study.name not in args.only:
            continue
        results = output / f"{study.name}.json"
        try:
            cores = Cores(args.runs / protocol.name, args.cores, study.ranks)
            few = tuple(contender for contender in study.contenders if contender.name in (args.contenders or ()))
            if few:
                carry_out(replace(study, contenders=few), protocol, cores, before=chosen_before(study, output))
            elif args.contenders:
                print(f"{study.name}: has none of {', '.join(args.contenders)}")
            elif not args.again:
                kept = read(study, protocol, results) if args.missing and results.exists() else None
                write(carry_out(study, protocol, cores, before=chosen_before(study, output), kept=kept), output)
            elif results.exists():
                write(read(study, protocol, results).complete(), output)
        except (JobError, ValueError) as error:
            sys.exit(f"evidence: error: {error}")


def read(study: Study, protocol: Protocol, results: Path) -> Outcome:
    """What an earlier call left."""
    return from_json(study, protocol, json.loads(results.read_text()))


def chosen_before(study: Study, folder: Path) -> Mapping[str, Settings]:
    """What the study that this one's tuning goes on from has chosen.

    Raises:
        ValueError: where that has no results yet.
    """
    after = study.tuning.after if study.tuning else None
    if after is None:
        return {}
    results = folder / f"{after}.json"
    if not results.exists():
        raise ValueError(f"{study.name}: its settings go on from those of {after}, of which {results} is not there")
    chosen: Mapping[str, Settings] = json.loads(results.read_text())["chosen"]
    return chosen


def write(outcome: Outcome, folder: Path) -> None:
    """A study's numbers, tables and curves, and the table of all studies."""
    name, report = outcome.study.name, to_markdown(outcome)
    (folder / f"{name}.json").write_text(json.dumps(to_json(outcome), indent=1) + "\n")
    (folder / f"{name}.md").write_text(report)
    draw(outcome, folder / f"{name}.png")
    files = [(study, folder / f"{study.name}.json") for study in STUDIES]
    present = [read(study, outcome.protocol, file).complete() for study, file in files if file.exists()]
    (folder / "README.md").write_text(summary(present))
    print(report, flush=True)


def parse_arguments() -> argparse.Namespace:
    names = [study.name for study in STUDIES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--protocol", choices=PROTOCOLS, default=SMALL.name, help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=names, metavar="STUDY", help=f"some of {', '.join(names)}")
    everyone = sorted({contender.name for study in STUDIES for contender in study.contenders})
    few = parser.add_mutually_exclusive_group()
    few.add_argument("--missing", action="store_true", help="run only the contenders that the results there are lack")
    few.add_argument(
        "--again", action="store_true", help="run nothing: tables and pictures of the results that are there"
    )
    few.add_argument(
        "--contenders",
        nargs="+",
        choices=everyone,
        metavar="NAME",
        help=f"run these alone, the first of each study as its baseline, and leave results to a call of all: "
        f"{', '.join(everyone)}",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="default: %(default)s")
    parser.add_argument(
        "--cores", type=int, nargs="+", default=sorted(os.sched_getaffinity(0)), help="default: all of this process"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
