"""Seconds to AdamW's final loss: a GPT of 13M parameters, 16,384 tokens a step, two data-parallel ranks, ZeRO 2.

AdamW's rate is the best of a few, chosen on another text. Jobs run one after the other, each with all the cores: a rank
trains on one of them and shares it with its root threads.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.evidence.execution import carry_out
from benchmarks.evidence.field import POLAR, RATE
from benchmarks.evidence.jobs import Cores, JobError
from benchmarks.evidence.outcome import Figure, to_json
from benchmarks.evidence.protocol import Contender, Protocol, Tuning
from benchmarks.evidence.report import to_markdown
from benchmarks.evidence.studies import GPT_MODERN_12M

# What Shampoo's seconds should stay within, in parts of AdamW's.
TARGET = 0.75

STUDY = replace(
    GPT_MODERN_12M,
    name="e2e",
    title="Language model: GPT of 13M parameters, 16,384 tokens a step, two ranks",
    config="gpt_zero2_shampoo.json",
    steps=160,
    horizons=(0.5,),
    evaluations=32,
    batch=32,
    ranks=2,
    tuning=Tuning("python_docs", steps=80, budget=5),
    contenders=(
        # DeepSpeed's own, as a job has it.
        Contender("AdamW", "AdamW", {"lr": 2e-3, "weight_decay": 0.01, "torch_adam": True}, (RATE,)),
        replace(POLAR, axes=()),
    ),
)


def main() -> None:
    args = parse_arguments()
    protocol = Protocol("e2e", (args.seed,), tuning_seed=args.seed + 100, most_trials=None, horizons=True, small=False)
    try:
        cores = Cores(args.runs, args.cores, STUDY.ranks)
        outcome = carry_out(replace(STUDY, steps=args.steps), protocol, cores)
    except (JobError, ValueError) as error:
        sys.exit(f"e2e: error: {error}")
    print(", ".join(f"{key}: {value}" for key, value in outcome.machine.items()))
    print(to_markdown(outcome))
    print(verdict(outcome.figures()[0]))
    if args.json:
        args.json.write_text(json.dumps(to_json(outcome), indent=1) + "\n")


def verdict(figure: Figure) -> str:
    """Whether the seconds of a contender's run that ends where the baseline does met the target."""
    found = figure.crossing
    if found.kind == "above":
        return f"{figure.contender} does not end where {figure.baseline} does in {found.steps:g} of its steps"
    met = "met" if found.seconds <= TARGET else "missed"
    most = "at most " if found.kind == "below" else ""
    return (
        f"{figure.contender} ends where {figure.baseline} does in {most}{found.steps:.2f} of its steps and "
        f"{found.seconds:.2f} of its seconds (target {TARGET}: {met})"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=STUDY.steps, help="of AdamW's runs; the other's are half as long too"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs; those done are only read")
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1], help="two for the two ranks")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
