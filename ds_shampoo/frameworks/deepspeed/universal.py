"""A checkpoint in DeepSpeed's universal form, which any number of ranks takes up, with Shampoo's blocks in it.

DeepSpeed's converter writes one form for stages 1 and 2 and another for stage 3, and each loads its own only. They
differ in little, so the converted folder is completed to be both. All of it happens in a folder beside, which is moved
into place when it is complete.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ds_shampoo.state.commit import finish
from ds_shampoo.state.files import FOLDER, BlockReader
from ds_shampoo.state.foreign import digest
from ds_shampoo.state.index import CheckpointError, Origin, Pointer, replace_text, write_index
from ds_shampoo.state.latest import LATEST, UNIVERSAL, named_by, pointer

# The files of model states that the two forms begin with.
_FLAT, _STAGE3 = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"
_STATES = ("fp32", "exp_avg", "exp_avg_sq")


def to_universal(folder: Path, tag: str | None = None, workers: int = 2) -> Path:
    """Runs DeepSpeed's converter on a checkpoint and takes Shampoo's blocks along.

    A conversion that fails or is killed changes nothing that is loaded; the next one clears its remains away.

    Returns:
        The new checkpoint's folder, `<tag>_universal` beside the old one, which `latest_universal` then names.

    Raises:
        CheckpointError: if the checkpoint is not Shampoo's, damaged, or not to be converted; nothing is written then.
        CalledProcessError: if DeepSpeed's converter fails.
    """
    tag = _tag(folder, tag)
    source, target = folder / tag, folder / f"{tag}_universal"
    finish(source / FOLDER)
    reader = BlockReader(source / FOLDER)
    _refuse_unconvertible(source, reader)
    reader.verify(reader.blocks)
    reader.verify_foreign()
    origin = Origin(source=Pointer(tag=tag, stamp=reader.header.stamp), latest=pointer(folder))
    work = folder / f"{tag}_universal.unfinished"
    shutil.rmtree(work, ignore_errors=True)
    try:
        fresh = work / target.name  # DeepSpeed's converter writes a latest_universal beside it
        _convert(source, fresh, workers, max(reader.header.steps.values(), default=0))
        _take_blocks_along(reader, fresh, origin)
        if target.exists():
            os.replace(target, work / "former")
        os.replace(fresh, target)
        replace_text(folder / UNIVERSAL, target.name)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _tag(folder: Path, tag: str | None) -> str:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder")
    tag = tag if tag is not None else named_by(folder / LATEST)
    if tag is None:
        raise CheckpointError(f"{folder} has no file {LATEST} that names a checkpoint; pass the tag")
    if not (folder / tag).is_dir() or not tag.strip("./"):
        raise CheckpointError(f"tag = {tag!r}: {folder} has no such checkpoint")
    return tag


def _refuse_unconvertible(source: Path, reader: BlockReader) -> None:
    if reader.index.universal is not None:
        raise CheckpointError(f"{source} is in universal form already")
    if not list(source.glob("*optim_states.pt")):
        raise CheckpointError(f"{source} was saved at stage 0: any number of ranks loads it at stage 0 as it is")
    if reader.header.tensor_parallel > 1:
        raise CheckpointError(f"{source} was saved under tensor parallelism, whose conversion has not been tried")
    if reader.header.expert_groups:
        raise CheckpointError(f"{source} holds experts, which DeepSpeed's converter can't convert")


def _convert(source: Path, target: Path, workers: int, step: int) -> None:
    """DeepSpeed's part of the checkpoint."""
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    command += ["--num_extract_workers", str(workers), "--num_merge_workers", str(workers)]
    subprocess.run(command, check=True)
    if not list(source.glob("mp_rank_01_*")):  # pipelines and slices run at stages 0 and 1 only
        _complete(target, step)


def _take_blocks_along(reader: BlockReader, target: Path, origin: Origin) -> None:
    """Copies the files of blocks, and writes the index of all that is in the new checkpoint."""
    foreign = [
        digest(target, path.relative_to(target).as_posix()) for path in sorted(target.rglob("*.pt")) if path.is_file()
    ]
    (target / FOLDER).mkdir()
    for file in reader.index.files:
        shutil.copyfile(reader.folder / file.name, target / FOLDER / file.name)
    header = {**reader.header.model_dump(), "stamp": uuid.uuid4().hex}
    write_index(target / FOLDER, header, reader.index.files, foreign, universal=origin)
    copy = BlockReader(target / FOLDER)
    copy.verify(copy.blocks)


def _complete(target: Path, step: int) -> None:
    """Gives a converted checkpoint what the other stages' loaders look for."""
    flat, stage3 = target / _FLAT, target / _STAGE3
    present, missing = (flat, stage3) if flat.is_file() else (stage3, flat)
    shutil.copyfile(present, missing)
    common = target / "zero" / "optimizer_state.pt"
    state = torch.load(common, weights_only=False)  # DeepSpeed has just written it
    state.setdefault("ds_version", version("deepspeed"))
    state.setdefault("optimizer_state_dict", {"state": {0: {"step": step}}, "param_groups": state["param_groups"]})
    torch.save(state, common)
    if present is stage3:
        _wrap_parameters(target, torch.load(stage3, weights_only=True)["param_shapes"])


def _wrap_parameters(target: Path, shapes: list[Mapping[str, Any]]) -> None:
    """Stage 3's converter writes flat tensors, where stages 1 and 2 expect whole ones with a note of their slicing."""
    for group in shapes:
        for name, shape in group.items():
            for key in _STATES:
                path = target / "zero" / name / f"{key}.pt"
                torch.save({"param": torch.load(path, weights_only=True).view(shape), "cat_dim": 0}, path)
