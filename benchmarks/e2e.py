"""Seconds to AdamW's final loss: a GPT of 13M parameters, 16,384 tokens a step, two data-parallel ranks.

Jobs run one after the other, each with all the cores: a rank trains on one of them and shares it with its root threads.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from benchmarks.evidence.figures import compare
from benchmarks.evidence.jobs import JobError, Result, run_all
from benchmarks.evidence.protocol import Contender, Job, Study
from benchmarks.report import number, table

# What Shampoo's seconds should stay within, in parts of AdamW's.
TARGET = 0.75

STUDY = Study(
    name="e2e",
    title="Language model: byte GPT of 13M parameters, 16,384 tokens a step, two ranks",
    program="pretrain_gpt.py",
    arguments=("--autocast", "--eval-windows", "400", "--layers", "4", "--d-model", "512", "--heads", "8"),
    corpus="gutenberg",
    steps=100,
    small_steps=100,
    evaluations=25,
    batch=32,
    ranks=2,
    contenders=(
        Contender("AdamW", "gpt_zero2_adamw.json", (1e-3,)),
        Contender("Shampoo", "gpt_zero2_shampoo.json", (4e-3,)),
    ),
)


def main() -> None:
    args = parse_arguments()
    study = replace(STUDY, steps=args.steps)
    jobs = [
        Job(study, contender, contender.lrs[0], args.seed, steps, max(1, args.steps // study.evaluations))
        for contender, steps in zip(study.contenders, (args.steps, round(args.part * args.steps)), strict=True)
    ]
    print(", ".join(f"{key}: {value}" for key, value in machine.describe().items()))
    try:
        adamw, shampoo = run_all(jobs, args.runs, args.cores)
    except JobError as error:
        sys.exit(f"e2e: error: {error}")
    figure = compare([shampoo], [adamw], "own")
    print(results_table([adamw, shampoo]))
    if figure.seconds is None or figure.steps is None:
        print(f"Shampoo did not reach AdamW's final loss within {args.part} of its steps")
    else:
        met = "met" if figure.seconds.median <= TARGET else "missed"
        print(
            f"Shampoo reaches AdamW's final loss after {figure.steps.median:.2f} of its steps and "
            f"{figure.seconds.median:.2f} of its seconds (target {TARGET}: {met})"
        )
    if args.json:
        found = {"machine": machine.describe(), "figure": figure.to_json()}
        runs = [{"name": run.job.contender.name, "lr": run.job.lr, "records": run.records} for run in (adamw, shampoo)]
        args.json.write_text(json.dumps(found | {"runs": runs}, indent=1) + "\n")


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
    parser.add_argument("--steps", type=int, default=STUDY.steps, help="of AdamW's run")
    parser.add_argument("--part", type=float, default=0.5, help="the length of Shampoo's schedule, in parts of AdamW's")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs; those done are only read")
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1], help="two for the two ranks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
