"""How a save takes effect at one moment, also over another one in the same folder.

The framework's files are written into a folder of their own, `unfinished-<stamp>`, and the index of the whole save
beside the one in force, as `index.json.next`. From the moment when that stands the save counts: `finish` moves
everything to its place, and whoever loads after a kill in the middle of it calls `finish` first. Before that moment
nothing of the former save was touched.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from ds_shampoo.state.index import INDEX, CheckpointError, confirm, read_index

NEXT = f"{INDEX}.next"

# The names that `files.file_name` has given in any release; what is called otherwise belongs to somebody else.
_BLOCKS = re.compile(r"(experts-)?rank\d{5,}-[0-9a-f]{8,32}\.safetensors")
_STAGING = re.compile(r"unfinished-[0-9a-f]{32}")


def staging(folder: Path, stamp: str) -> Path:
    """Where the framework's files of a save are written first."""
    return folder / f"unfinished-{stamp}"


def finish(folder: Path) -> None:
    """Moves to its place what a complete save has left to be moved; any number of calls do what one does.

    Raises:
        OSError: if the folder can't be written to; a later call goes on from there.
    """
    path = folder / NEXT
    try:
        index = read_index(path)
    except CheckpointError:
        return  # the index in force decides, by its checksums
    source = staging(folder, index.header.stamp)
    for file in index.foreign:
        if (source / file.name).is_file():
            os.replace(source / file.name, folder.parent / file.name)
    os.replace(path, folder / INDEX)
    confirm(folder / INDEX)


def discard_former(folder: Path) -> None:
    """Removes what former saves, and some cut short, have left; what Shampoo did not write stays."""
    kept = {file.name for file in read_index(folder / INDEX).files}
    for path in folder.iterdir():
        if _BLOCKS.fullmatch(path.name) and path.name not in kept and path.is_file():
            path.unlink()
        elif _STAGING.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path)
