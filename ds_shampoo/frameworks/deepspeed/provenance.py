"""Which job a checkpoint is of: what its index says of the engine that saved it, held against the one that loads it."""

from __future__ import annotations

import pickle
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ds_shampoo.frameworks import protocols
from ds_shampoo.frameworks.deepspeed import internals
from ds_shampoo.optimizer import Shampoo
from ds_shampoo.state.files import FOLDER, BlockReader, CheckpointError


def describe(engine: Any, optimizer: Shampoo) -> dict[str, Any]:
    """What the index records of the job that saves."""
    return {
        "ds_shampoo": version("ds-shampoo"),
        "optimizer": type(engine.optimizer).__name__,
        "global_steps": engine.global_steps,
        "world_size": dist.get_world_size(),
        "tensor_parallel": protocols.slices(engine.mpu),
        "pipeline_stages": internals.pipeline_stages(engine),
        "expert_groups": _expert_groups(engine),
        "scheduled": [{key: _plain(value) for key, value in group.items()} for group in optimizer.scheduled()],
    }


def check_world(engine: Any, reader: BlockReader) -> None:
    """Refuses what DeepSpeed would load in part only.

    Raises:
        CheckpointError: for another number of ranks, or another layout of the optimizer's state.
    """
    saved_slices, slices = reader.header.tensor_parallel, protocols.slices(engine.mpu)
    if saved_slices != slices:
        raise CheckpointError(
            f"{reader.folder}: saved at tensor-parallel size {saved_slices}, to be loaded at {slices}; DeepSpeed takes "
            "moments up at the same size only"
        )
    if engine.load_universal_checkpoint():
        return
    saved, present = reader.header.optimizer, type(engine.optimizer).__name__
    ranks, here = reader.header.world_size, dist.get_world_size()
    advice = "convert it with `ds-shampoo to-universal` and set checkpoint.load_universal"
    stages = reader.header.pipeline_stages
    if stages != internals.pipeline_stages(engine):
        raise CheckpointError(
            f"{reader.folder}: saved over {stages} pipeline stages, to be loaded over "
            f"{internals.pipeline_stages(engine)}; if that was at ZeRO stage 1, {advice}"
        )
    experts, expected = reader.header.expert_groups, _expert_groups(engine)
    if experts != expected:
        raise CheckpointError(
            f"{reader.folder}: experts lay over {experts} when this was saved, and lie over {expected} now; DeepSpeed "
            "takes their moments up at the same expert-parallel size only"
        )
    if saved != present:
        raise CheckpointError(f"{reader.folder}: DeepSpeed's {saved} saved this, but {present} is to load it; {advice}")
    if ranks != here and engine.zero_optimization_stage() > 0:
        raise CheckpointError(f"{reader.folder}: {ranks} ranks saved this, but {here} are to load it; {advice}")


def saved_by_shampoo(folder: Path) -> bool:
    """Whether DeepSpeed's files say so; False where they can't be read without executing what is in them."""
    for path in sorted(folder.glob("*model_states.pt"))[:1]:
        try:
            found = torch.load(path, map_location="meta", mmap=True, weights_only=True)
            return bool(found["ds_config"]["optimizer"]["type"] == "Shampoo")
        except (pickle.UnpicklingError, RuntimeError, OSError, KeyError, TypeError):
            return False
    return False


def without_blocks(folder: Path) -> str:
    """The message for a checkpoint of Shampoo's that has lost its blocks."""
    return (
        f"{folder}: Shampoo saved this checkpoint, but its folder {FOLDER}/ is missing; a universal one is made by "
        "`ds-shampoo to-universal`, not by DeepSpeed's own converter"
    )


def slice_rank(engine: Any) -> int:
    """This rank's number among the tensor-parallel ones."""
    return protocols.slice_rank(engine.mpu)


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if hasattr(value, "tolist"):  # a tensor, or a number of numpy's
        return value.tolist()
    return list(value) if isinstance(value, tuple) else value


def _expert_groups(engine: Any) -> list[str]:
    """The names of the groups over which experts are spread; DeepSpeed's tell their sizes."""
    named = (internals.expert_group(parameter) for parameter in engine.module.parameters())
    return sorted({name for name in named if name is not None})
