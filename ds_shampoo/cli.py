"""The command `ds-shampoo`."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_shampoo.checkpoint.files import FOLDER, BlockReader, CheckpointError


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
    universal.add_argument("--workers", type=int, default=2, help="processes to convert with (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        target = to_universal(options.folder, options.tag, options.workers)
    except (CheckpointError, OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"ds-shampoo: error: {error}")
    print(f'{target}: load it with "checkpoint": {{"load_universal": true}} in the DeepSpeed JSON')


def to_universal(folder: Path, tag: str | None = None, workers: int = 2) -> Path:
    """Runs DeepSpeed's converter on a checkpoint and takes Shampoo's blocks along.

    Returns:
        The new checkpoint's folder, `<tag>_universal` beside the old one, which `latest_universal` then names.

    Raises:
        CheckpointError: if the checkpoint is not Shampoo's or damaged; nothing is written then.
        CalledProcessError: if DeepSpeed's converter fails.
    """
    tag = tag or (folder / "latest").read_text().strip()
    source, target = folder / tag, folder / f"{tag}_universal"
    reader = BlockReader(source / FOLDER)
    reader.verify(reader.blocks)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    command += ["--num_extract_workers", str(workers), "--num_merge_workers", str(workers)]
    subprocess.run(command, check=True)
    shutil.copytree(source / FOLDER, target / FOLDER, dirs_exist_ok=True)
    return target


if __name__ == "__main__":
    main()
