"""The files `latest` and `latest_universal`, which name a checkpoint of their folder."""

from __future__ import annotations

from pathlib import Path

from ds_shampoo.state.files import FOLDER, INDEX
from ds_shampoo.state.index import CheckpointError, Pointer, read_index

LATEST, UNIVERSAL = "latest", "latest_universal"


def named_by(path: Path) -> str | None:
    """The tag that such a file names; None where there is no file.

    Raises:
        CheckpointError: if it can't be read, is empty, or names a checkpoint that is not there.
    """
    try:
        tag = path.read_bytes().decode().strip()
    except FileNotFoundError:
        if path.is_symlink():
            raise CheckpointError(f"{path} is a link to a file that is not there") from None
        return None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is damaged: it is not UTF-8 text; pass the checkpoint's tag") from error
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    if not tag or not tag.isprintable():
        state = "is damaged: it is no checkpoint's name" if tag else "is empty"
        raise CheckpointError(f"{path} {state}; pass the checkpoint's tag")
    if not (path.parent / tag).is_dir():
        raise CheckpointError(f"{path} names {tag}, but there is no folder {path.parent / tag}; pass another tag")
    return tag


def pointer(folder: Path) -> Pointer | None:
    """The checkpoint that a folder's `latest` names, with its stamp; None where nothing is named.

    Raises:
        CheckpointError: as `named_by`.
    """
    tag = named_by(folder / LATEST)
    if tag is None:
        return None
    try:
        return Pointer(tag=tag, stamp=read_index(folder / tag / FOLDER / INDEX).header.stamp)
    except CheckpointError:
        return Pointer(tag=tag, stamp=None)  # another optimizer's
