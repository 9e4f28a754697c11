"""`engine.save_checkpoint`: blocks first, then DeepSpeed's files, then the index that ties them, then `latest`."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ds_shampoo.frameworks.deepspeed import internals
from ds_shampoo.frameworks.deepspeed.accumulation import Accumulation
from ds_shampoo.frameworks.deepspeed.experts import ExpertWeights
from ds_shampoo.frameworks.deepspeed.provenance import describe, slice_rank
from ds_shampoo.frameworks.deepspeed.together import together
from ds_shampoo.optimizer import Shampoo
from ds_shampoo.sharding.gathering import gathered
from ds_shampoo.state import saving
from ds_shampoo.state.commit import NEXT, discard_former, finish, staging
from ds_shampoo.state.files import FOLDER, file_name, write_file
from ds_shampoo.state.foreign import digest
from ds_shampoo.state.index import BlockFile, CheckpointError, ForeignFile, replace_text, write_index
from ds_shampoo.state.latest import LATEST

logger = logging.getLogger("ds_shampoo")


class WatchedWriter:
    """DeepSpeed's checkpoint engine for the time of a save: files go to another folder, and the first error waits.

    DeepSpeed has barriers after its writes. A rank that raised in a write would leave the others standing there.
    """

    def __init__(self, inner: Any, folder: Path, instead: Path | None) -> None:
        """What is meant for `folder` is written into `instead`, unless that is None."""
        self.written: list[str] = []
        self.error: Exception | None = None
        self._inner = inner
        self._folder = folder
        self._instead = instead

    def save(self, state_dict: Any, path: Any) -> Any:
        """As the engine's own, but that nothing is raised, and nothing written after an error."""
        self.attempt(self._save)(state_dict, Path(path))

    def _save(self, state_dict: Any, path: Path) -> None:
        if self._instead is None or path.parent.absolute() != self._folder.absolute():
            self._inner.save(state_dict, str(path))
            return
        self._instead.mkdir(parents=True, exist_ok=True)
        self._inner.save(state_dict, str(self._instead / path.name))
        self.written.append(path.name)

    def makedirs(self, path: Any, exist_ok: bool = False) -> Any:
        """As the engine's own, but that nothing is raised."""
        return self.attempt(self._inner.makedirs)(path, exist_ok=exist_ok)

    def attempt(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function as one that raises nothing, and does nothing after an error."""

        @functools.wraps(function)
        def attempted(*arguments: Any, **named: Any) -> Any:
            if self.error is None:
                try:
                    return function(*arguments, **named)
                except Exception as error:
                    self.error = error
            return None

        return attempted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def save(
    engine: Any,
    optimizer: Shampoo,
    *,
    accumulation: Accumulation,
    options: dict[str, Any],
    deepspeeds: Callable[[], Any],
) -> Any:
    """A whole save.

    Args:
        options: the arguments of DeepSpeed's `save_checkpoint` by name; changed.
        deepspeeds: calls it with them.

    Raises:
        ValueError: without a folder or with an empty tag.
        CheckpointError: on all ranks, if any of them can't write, or is between micro-batches.
    """
    if not options["save_dir"]:
        raise ValueError(f"save_dir = {options['save_dir']!r}: must name a folder")
    if options["tag"] == "":
        raise ValueError("tag = '': must name the checkpoint; leave it out for DeepSpeed's global_step<number>")
    tag = str(options["tag"] if options["tag"] is not None else f"global_step{engine.global_steps}")
    folder = Path(options["save_dir"], tag, FOLDER)
    stamp = _agreed(tag, accumulation)
    with together():
        if engine.global_rank == 0:
            finish(folder)  # a save under this tag that was killed in its last moment
    # DeepSpeed writes `latest` in place; a kill in between would leave it empty.
    at_once = not internals.writes_later(engine)
    ours = options["save_latest"] and at_once
    if ours:
        options["save_latest"] = False
    try:
        files, header = _write_blocks(engine, optimizer, folder, stamp)
        result, foreign = _write_deepspeeds(engine, deepspeeds, folder.parent, stamp if at_once else None)
    except Exception:
        _give_up(engine, folder, stamp)
        raise
    _write_index(engine, folder, header=header, files=files, foreign=foreign)
    with together():
        if engine.global_rank == 0:
            finish(folder)
            if ours:
                replace_text(Path(options["save_dir"], LATEST), tag)
    if engine.global_rank == 0:
        try:
            discard_former(folder)
        except (OSError, CheckpointError) as error:
            logger.warning("files of former saves stay in %s: %s", folder, error)
    dist.barrier()
    return result


def _agreed(tag: str, accumulation: Accumulation) -> str:
    """The save's stamp, once all ranks are at the end of a step and save under one tag."""
    with together():
        if accumulation.under_way():
            raise CheckpointError(
                "save_checkpoint between micro-batches: the gradients of a step half done are in no checkpoint; save "
                "after the micro-batch with which the engine steps"
            )
    shared: list[Any] = [tag, uuid.uuid4().hex]
    dist.broadcast_object_list(shared, src=0)
    with together():
        if shared[0] != tag:
            raise CheckpointError(f"save_checkpoint: the tag is {tag!r} here, and {shared[0]!r} on rank 0")
    return str(shared[1])


def _write_blocks(engine: Any, optimizer: Shampoo, folder: Path, stamp: str) -> tuple[list[BlockFile], dict[str, Any]]:
    """Writes this rank's blocks, under a name of this save: the folder's former content stays in force.

    Returns:
        The files, and this rank's part of the header.
    """
    files: list[BlockFile] = []
    with together():
        subgroups = optimizer.subgroups()  # which a rank refuses after a step that broke
        states, header = saving.blocks_state(subgroup.sharded for subgroup in subgroups), saving.header(subgroups)
        if slice_rank(engine) > 0:  # what is not sliced is written by the first of those that have it
            sliced = optimizer.sliced_parameters()
            states = {name: state for name, state in states.items() if name.rpartition("[")[0] in sliced}
        name = file_name(engine.global_rank, stamp)
        weights = ExpertWeights(engine, slice_rank(engine)).to_save()
        files.append(_written(folder, name, states))
        if weights:
            files.append(_written(folder, f"experts-{name}", weights))
        header |= {**describe(engine, optimizer), "stamp": stamp}
    return files, header


def _written(folder: Path, name: str, states: Mapping[str, Mapping[str, Any]]) -> BlockFile:
    try:
        return write_file(folder, name, states)
    except Exception as error:
        raise CheckpointError(f"{folder / name}: {error}") from error


def _give_up(engine: Any, folder: Path, stamp: str) -> None:
    """Removes what this rank wrote of a save that failed on any: the disk may be full."""
    with contextlib.suppress(OSError):
        for name in (file_name(engine.global_rank, stamp), f"experts-{file_name(engine.global_rank, stamp)}"):
            (folder / name).unlink(missing_ok=True)
        if engine.global_rank == 0:
            shutil.rmtree(staging(folder, stamp), ignore_errors=True)


def _write_deepspeeds(
    engine: Any, deepspeeds: Callable[[], Any], folder: Path, stamp: str | None
) -> tuple[Any, list[ForeignFile]]:
    """DeepSpeed's own save: its result, and the files that this rank wrote.

    Args:
        folder: the checkpoint's.
        stamp: of the save, for files that wait for its end; None where they are written later, in the background.

    Raises:
        CheckpointError: on all ranks, if any of them failed to write a file.
    """
    instead = staging(folder / FOLDER, stamp) if stamp is not None else None
    watched = WatchedWriter(internals.checkpoint_writer(engine), folder, instead)
    with together(own_errors=True), internals.writing_by(engine, watched, script=watched.attempt):
        result = deepspeeds()
    with together():
        if watched.error is not None:
            raise watched.error
        foreign = [digest(instead, name) for name in watched.written] if instead is not None else []
    return result, foreign


def _write_index(
    engine: Any,
    folder: Path,
    *,
    header: dict[str, Any],
    files: list[BlockFile],
    foreign: list[ForeignFile],
) -> None:
    """One rank writes the index of all, by which the save is complete.

    Raises:
        CheckpointError: on all ranks, if it can't, or if a block has two owners.
    """
    everyones = gathered((files, foreign, header["steps"]))
    all_files = [file for each, _, _ in everyones for file in each]
    twice = [name for name, n in Counter(name for file in all_files for name in file.blocks).items() if n > 1]
    if twice:
        raise CheckpointError(f"{folder}: {len(twice)} blocks belong to more than one rank, {twice[0]} first")
    with together():
        if engine.global_rank == 0:
            steps = {name: step for _, _, each in everyones for name, step in each.items()}
            all_foreign = {file.name: file for _, each, _ in everyones for file in each}
            write_index(folder, {**header, "steps": steps}, all_files, all_foreign.values(), name=NEXT)
