"""Seconds to AdamW's final loss: a GPT of 13M parameters, 16,384 tokens a step, two data-parallel ranks.

AdamW's rate is the best of a grid, with a neighbour tried on both sides. Jobs run one after the other, each with all
the cores: a rank trains on one of them and shares it with its root threads.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from benchmarks.evidence.execution import choose_from
from benchmarks.evidence.figures import Figure, best_rate, compare
from benchmarks.evidence.jobs import JobError, Result
from benchmarks.evidence.protocol import Contender, Protocol
from benchmarks.evidence.studies import GPT_12M
from benchmarks.report import number, table

# What Shampoo's seconds should stay within, in parts of AdamW's.
TARGET = 0.75

STUDY = replace(
    GPT_12M,
    name="e2e",
    title="Language model: byte GPT of 13M parameters, 16,384 tokens a step, two ranks",
    steps=160,
    small_steps=160,
    evaluations=32,
    batch=32,
    ranks=2,
    contenders=(
        Contender("AdamW", "gpt_zero2_adamw.json", (1e-3, 2e-3, 4e-3)),
        Contender("Shampoo", "gpt_zero2_shampoo.json", (4e-3,), horizon=0.5),
        replace(GPT_12M.contender("Spectral"), lrs=(8e-3,), horizon=0.5),
    ),
)


def main() -> None:
    args = parse_arguments()
    study = replace(STUDY, steps=args.steps)
    protocol = Protocol("e2e", (args.seed,), grid=True, small=False)
    print(", ".join(f"{key}: {value}" for key, value in machine.describe().items()))
    try:
        tried = choose_from(study, protocol, args.runs, args.cores)
    except JobError as error:
        sys.exit(f"e2e: error: {error}")
    results = [result for runs in tried.values() for result in runs]
    print(results_table(results))
    adamw, *others = map(best_run, tried.values())
    figures = [compare([run], [adamw]) for run in others]
    print("\n".join(map(verdict, figures)))
    if args.json:
        found = {"machine": machine.describe(), "figures": [figure.to_json() for figure in figures]}
        runs = [{"name": run.job.contender.name, "lr": run.job.lr, "records": run.records} for run in results]
        args.json.write_text(json.dumps(found | {"runs": runs}, indent=1) + "\n")


def best_run(runs: Sequence[Result]) -> Result:
    """The one that ended best."""
    return next(run for run in runs if run.job.lr == best_rate(runs))


def verdict(figure: Figure) -> str:
    """Whether a contender's seconds to the end of the best AdamW met the target."""
    if figure.seconds is None or figure.steps is None:
        return f"{figure.contender} did not reach AdamW's final loss within its schedule"
    met = "met" if figure.seconds.median <= TARGET else "missed"
    return (
        f"{figure.contender} reaches AdamW's final loss after {figure.steps.median:.2f} of its steps and "
        f"{figure.seconds.median:.2f} of its seconds (target {TARGET}: {met})"
    )


def results_table(results: list[Result]) -> str:
    rows = [
        [
            result.job.contender.name,
            f"{result.job.lr:g}",
            str(result.job.schedule),
            number(result.final, 4),
            number(result.records[-1]["seconds"]),
            number(1e3 * result.records[-1]["seconds"] / result.job.schedule),
        ]
        for result in results
    ]
    return table(("optimizer", "lr", "steps", "val loss", "seconds", "ms a step"), rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=STUDY.steps, help="of AdamW's runs; the others' are half as long")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs; those done are only read")
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1], help="two for the two ranks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
