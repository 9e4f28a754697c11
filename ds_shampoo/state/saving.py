"""What a checkpoint holds beside torch's own optimizer state, and whether one fits the optimizer that loads it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.config import SettingsError
from ds_shampoo.state.block import misfit
from ds_shampoo.state.files import BlockReader, CheckpointError
from ds_shampoo.step.sharded_group import ShardedGroup
from ds_shampoo.step.subgroups import BoundSubgroup

logger = logging.getLogger("ds_shampoo")

# Settings that decide which blocks there are; a checkpoint made with others can't be taken up.
STRUCTURAL = ("block_size", "max_preconditioner_dim", "max_factor_ratio", "merge_small_dims", "embedding")
# Releases before this rule cut fused matrices as one, and gave LoRA's long sides factors: such blocks start fresh.
_RULE = {"rule": "fused parts apart, LoRA by its rank"}


def blocks_state(groups: Iterable[ShardedGroup]) -> dict[str, Any]:
    """The factors, roots and jobs under way of this rank's blocks, by block name; plain tensors and numbers.

    Factors and roots are those in use, and not copies: a second set of them may not fit on the device.
    """
    return {
        str(owned.block): {"origin": list(owned.block.origin), "shape": list(owned.block.shape), **owned.state()}
        for group in groups
        for owned in group.owned_blocks
    }


def load_blocks(saved: Mapping[str, Any], subgroups: Sequence[BoundSubgroup]) -> None:
    """Takes back what `blocks_state` gave.

    Raises:
        SettingsError: if a block of this rank is missing; nothing is touched then.
    """
    blocks = [str(owned.block) for subgroup in subgroups for owned in subgroup.sharded.owned_blocks]
    missing = [block for block in blocks if block not in saved]
    if missing:
        raise SettingsError(
            f"the checkpoint lacks the factors of {len(missing)} of this rank's {len(blocks)} blocks, "
            f"{missing[0]} first: it was saved by another world size or another model"
        )
    for subgroup in subgroups:
        for owned in subgroup.sharded.owned_blocks:
            owned.load(saved[str(owned.block)], subgroup.settings)


def header(subgroups: Sequence[BoundSubgroup]) -> dict[str, Any]:
    """What an index says of all blocks together: how they were cut, and each parameter's step count."""
    return {
        "settings": [subgroup.settings.model_dump(mode="json") for subgroup in subgroups],
        "cut": _cuts(subgroups),
        "steps": {
            name: int(state["step"])
            for subgroup in subgroups
            for name, state in subgroup.sharded.states_by_name(subgroup.states).items()
            if "step" in state
        },
    }


def own_blocks(subgroups: Sequence[BoundSubgroup]) -> set[str]:
    """The names of this rank's blocks."""
    return {str(owned.block) for subgroup in subgroups for owned in subgroup.sharded.owned_blocks}


def check(subgroups: Sequence[BoundSubgroup], reader: BlockReader) -> None:
    """Holds a checkpoint's folder against this rank's blocks, and reads those that fit.

    Raises:
        CheckpointError: naming the block that is missing or has another shape although blocks are cut as they
            were, or whose state no block can have; or the file that is missing or damaged.
    """
    same_cut = reader.header.cut == json.loads(json.dumps(_cuts(subgroups)))
    fitting: dict[str, Block] = {}
    for subgroup in subgroups:
        for block in (owned.block for owned in subgroup.sharded.owned_blocks):
            if reader.holds(block):
                fitting[str(block)] = block
            elif same_cut:
                raise CheckpointError(
                    f"{reader.folder}: has no block {block} of shape {block.shape}: it was saved of another model, or "
                    "with other patterns under 'fused_parts', 'batch_dims' or 'roles'"
                )
    reader.fetch(fitting)
    for name, block in fitting.items():
        problem = misfit(reader.read(name), block)
        if problem:
            raise CheckpointError(f"{reader.folder}, block {name}: {problem}")


def restore(subgroups: Sequence[BoundSubgroup], reader: BlockReader) -> None:
    """Takes this rank's blocks and step counts from a checked folder; blocks that were cut otherwise start fresh.

    Raises:
        CheckpointError: if the framework's files, which are loaded by then, have other step counts than the blocks.
    """
    fresh: list[str] = []
    for subgroup in subgroups:
        for name, state in subgroup.sharded.states_by_name(subgroup.states).items():
            _count_as_saved(name, state, reader)
        for owned in subgroup.sharded.owned_blocks:
            block = owned.block
            if reader.holds(block):
                owned.load(reader.read(str(block)), subgroup.settings)
            else:
                fresh.append(str(block))
    if fresh:
        logger.warning(
            "%d of this rank's %d blocks were cut otherwise in the checkpoint and start fresh, %s first",
            len(fresh), len(own_blocks(subgroups)), fresh[0],
        )  # fmt: skip


def _count_as_saved(name: str, state: dict[str, Any], reader: BlockReader) -> None:
    """Holds a parameter's step count against the index; a universal checkpoint has one for all, and gets its own."""
    saved = reader.header.steps.get(name)
    if saved is None:
        return
    if reader.index.universal is None and "step" in state and int(state["step"]) != saved:
        raise CheckpointError(
            f"{reader.folder}: {name} was saved after {saved} steps, but DeepSpeed's files are of step "
            f"{int(state['step'])}: two saves are mixed; load another checkpoint into a new engine"
        )
    state["step"] = saved


def _cuts(subgroups: Sequence[BoundSubgroup]) -> list[dict[str, Any]]:
    """The settings by which blocks are cut, of each param group once, and the rule, where it changed with a release."""
    cuts = [{**{key: getattr(subgroup.settings, key) for key in STRUCTURAL}, **_RULE} for subgroup in subgroups]
    return [cut for number, cut in enumerate(cuts) if cut not in cuts[:number]]
