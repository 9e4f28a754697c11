"""A checkpoint in DeepSpeed's universal form, which any number of ranks takes up, with Shampoo's blocks in it.

DeepSpeed's converter writes one form for stages 1 and 2 and another for stage 3, and each loads its own only. They
differ in little, so the converted folder is completed to be both.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ds_shampoo.checkpoint.files import FOLDER, BlockReader, CheckpointError

# The files of model states that the two forms begin with.
_FLAT, _STAGE3 = "mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"
_STATES = ("fp32", "exp_avg", "exp_avg_sq")


def to_universal(folder: Path, tag: str | None = None, workers: int = 2) -> Path:
    """Runs DeepSpeed's converter on a checkpoint and takes Shampoo's blocks along.

    Returns:
        The new checkpoint's folder, `<tag>_universal` beside the old one, which `latest_universal` then names.

    Raises:
        CheckpointError: if the checkpoint is not Shampoo's, damaged, or not to be converted; nothing is written then.
        CalledProcessError: if DeepSpeed's converter fails.
    """
    tag = tag or (folder / "latest").read_text().strip()
    source, target = folder / tag, folder / f"{tag}_universal"
    reader = BlockReader(source / FOLDER)
    reader.verify(reader.blocks)
    if not list(source.glob("*optim_states.pt")):
        raise CheckpointError(f"{source} was saved at stage 0: any number of ranks loads it at stage 0 as it is")
    if reader.header["tensor_parallel"] > 1:
        raise CheckpointError(f"{source} was saved under tensor parallelism, whose conversion has not been tried")
    if reader.header["expert_groups"]:
        raise CheckpointError(f"{source} holds experts, which DeepSpeed's converter can't convert")
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(target)]
    command += ["--num_extract_workers", str(workers), "--num_merge_workers", str(workers)]
    subprocess.run(command, check=True)
    if not list(source.glob("mp_rank_01_*")):  # pipelines and slices run at stages 0 and 1 only
        _complete(target, max(reader.header["steps"].values(), default=0))
    shutil.copytree(source / FOLDER, target / FOLDER, dirs_exist_ok=True)
    return target


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
