"""The command `ds-shampoo`."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_shampoo.frameworks.deepspeed.universal import to_universal
from ds_shampoo.state.index import CheckpointError


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; exits with a message where it can't do what is asked."""
    parser = argparse.ArgumentParser(prog="ds-shampoo", description="Tools for Shampoo under DeepSpeed.")
    commands = parser.add_subparsers(dest="command", required=True)
    universal = commands.add_parser(
        "to-universal",
        help="turn a checkpoint into DeepSpeed's universal form, which any number of ranks and ZeRO stage can load",
    )
    universal.add_argument("folder", type=Path, help="what save_checkpoint was given as its folder")
    universal.add_argument("--tag", help="the checkpoint (default: the one that the file `latest` names)")
    universal.add_argument(
        "--workers", type=_positive, default=2, help="processes to convert with (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        target = to_universal(options.folder, options.tag, options.workers)
    except (CheckpointError, OSError, ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"ds-shampoo: error: {error}")
    print(f'{target}: load it with "checkpoint": {{"load_universal": true}} in the DeepSpeed JSON')


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is below 1")
    return number


if __name__ == "__main__":
    main()
