"""Runs studies under a protocol and writes their results: `python -m benchmarks.evidence --protocol full`.

Jobs run one to a core, root threads included. Those that are done already are only read, so a call that was killed
goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import machine
from benchmarks.evidence.figures import best_rate, next_rate
from benchmarks.evidence.jobs import JobError, Result, run_all
from benchmarks.evidence.outcome import Outcome, from_json, to_json
from benchmarks.evidence.protocol import FULL, SMALL, Protocol, Study
from benchmarks.evidence.report import draw, to_markdown
from benchmarks.evidence.studies import STUDIES
from benchmarks.evidence.summary import write_summary

PROTOCOLS = {protocol.name: protocol for protocol in (SMALL, FULL)}


def main() -> None:
    args = parse_arguments()
    protocol = PROTOCOLS[args.protocol]
    studies = [study for study in STUDIES if args.only is None or study.name in args.only]
    runs = args.runs / protocol.name
    output = args.output / protocol.name
    output.mkdir(parents=True, exist_ok=True)
    for study in studies:
        kept = output / f"{study.name}.json"
        if args.again and not kept.exists():
            continue
        try:
            if args.again:
                outcome = from_json(study, protocol, json.loads(kept.read_text()))
            else:
                outcome = carry_out(study, protocol, runs, args.cores)
        except (JobError, ValueError) as error:
            sys.exit(f"evidence: error: {error}")
        kept.write_text(json.dumps(to_json(outcome), indent=1) + "\n")
        (output / f"{study.name}.md").write_text(to_markdown(outcome))
        draw(outcome, output / f"{study.name}.png")
        write_summary(output, STUDIES)
        print(to_markdown(outcome), flush=True)


def carry_out(study: Study, protocol: Protocol, runs: Path, cores: Sequence[int]) -> Outcome:
    """Chooses every contender's learning rate, then runs what the figures are taken from."""
    search = choose_from(study, protocol, runs, cores)
    chosen = {name: best_rate(results) for name, results in search.items()}
    final = run_all(protocol.final(study, chosen), runs, cores)
    trials = [result for results in search.values() for result in results]
    return Outcome(study, protocol, trials, final, chosen, machine.describe())


def choose_from(study: Study, protocol: Protocol, runs: Path, cores: Sequence[int]) -> dict[str, list[Result]]:
    """Every contender's trials; under a protocol with grids, until each best rate has a neighbour on both sides."""
    search: dict[str, list[Result]] = {contender.name: [] for contender in study.contenders}
    jobs = protocol.search(study)
    while jobs:
        for result in run_all(jobs, runs, cores):
            search[result.job.contender.name].append(result)
        ahead = {contender: next_rate(search[contender.name]) for contender in study.contenders if protocol.grid}
        jobs = [protocol.trial(study, contender, lr) for contender, lr in ahead.items() if lr is not None]
    return search


def parse_arguments() -> argparse.Namespace:
    names = [study.name for study in STUDIES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--protocol", choices=PROTOCOLS, default=SMALL.name, help="default: %(default)s")
    parser.add_argument("--only", nargs="+", choices=names, metavar="STUDY", help=f"some of {', '.join(names)}")
    parser.add_argument(
        "--again", action="store_true", help="run nothing: tables and pictures of the results that are there"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/evidence"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="default: %(default)s")
    parser.add_argument(
        "--cores", type=int, nargs="+", default=sorted(os.sched_getaffinity(0)), help="default: all of this process"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
