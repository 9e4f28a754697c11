"""The command line that the training programs share, and the JSON that it completes."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from run_folder import RunError, RunFolder

# DeepSpeed's schedules that have to know how long the run is.
SCHEDULES_WITH_LENGTH = ("WarmupCosineLR", "WarmupDecayLR")


def build_parser(description: str, *, steps: int, eval_interval: int, data: str) -> argparse.ArgumentParser:
    """What every program takes; the arguments are its defaults and its word for what `--data` names."""
    parser = argparse.ArgumentParser(description=description)
    positive = integer_from(1)
    parser.add_argument(
        "--deepspeed_config", type=Path, required=True, help="DeepSpeed's JSON, which names the optimizer"
    )
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--name", help="name of the run (default: that of the JSON file)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of all runs (default: %(default)s)")
    parser.add_argument("--data", type=Path, help=data)
    parser.add_argument("--steps", type=positive, default=steps, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--stop-at", type=positive, help="stop at this step; a later call goes on to --steps")
    parser.add_argument("--seed", type=integer_from(0), default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--lr", type=float, help="peak learning rate, in place of the JSON's")
    parser.add_argument(
        "--autocast", action="store_true", help="compute in bfloat16; weights and gradients stay as the JSON has them"
    )
    parser.add_argument(
        "--eval-interval", type=positive, default=eval_interval, help="steps between validations (default: %(default)s)"
    )
    parser.add_argument(
        "--save-interval",
        type=integer_from(0),
        default=100,
        help="steps between checkpoints, 0 for none at all (default: %(default)s)",
    )
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, checked as far as it can be without reading anything."""
    arguments = parser.parse_args()
    if "RANK" not in os.environ:
        parser.error("start this program with the deepspeed launcher or torchrun")
    arguments.name = arguments.name or arguments.deepspeed_config.stem
    if not re.fullmatch(r"\w[\w.-]*", arguments.name):
        parser.error(f"--name {arguments.name}: letters, digits, '_', '-' and '.' only; it names a folder")
    return arguments


def effective_config(arguments: argparse.Namespace) -> dict[str, Any]:
    """DeepSpeed's JSON with what depends on this call filled in: rate, the schedule's length, where events go.

    Raises:
        RunError: where the file can't be read as JSON.
    """
    try:
        config: dict[str, Any] = json.loads(arguments.deepspeed_config.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"--deepspeed_config {arguments.deepspeed_config}: {error}") from None
    if arguments.lr is not None:
        config.setdefault("optimizer", {}).setdefault("params", {})["lr"] = arguments.lr
    scheduler = config.get("scheduler", {})
    if scheduler.get("type") in SCHEDULES_WITH_LENGTH:
        scheduler.setdefault("params", {})["total_num_steps"] = arguments.steps
    if "tensorboard" in config:
        folder = RunFolder(arguments.runs / arguments.name).tensorboard
        config["tensorboard"] |= {"output_path": str(folder.parent), "job_name": folder.name}
    return config


def integer_from(least: int) -> Callable[[str], int]:
    """An argument's type: a whole number that is at least `least`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value}: must be at least {least}")
        return value

    return integer
