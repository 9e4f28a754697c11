"""What a checkpoint holds beside torch's own optimizer state, and whether one fits the optimizer that loads it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.algorithm.preconditioner import ShampooPreconditioner
from ds_shampoo.checkpoint.files import BlockReader, CheckpointError
from ds_shampoo.config import GroupSettings, SettingsError
from ds_shampoo.group import ShardedGroup, Unit
from ds_shampoo.host.roots import RootKeeper

logger = logging.getLogger("ds_shampoo")

# Settings that decide which blocks there are; a checkpoint made with others can't be taken up.
_STRUCTURAL = ("block_size", "max_preconditioner_dim", "merge_small_dims", "embedding")


def blocks_state(groups: Iterable[ShardedGroup]) -> dict[str, Any]:
    """The factors, roots and jobs under way of this rank's blocks, by block name; plain tensors and numbers.

    Factors and roots are those in use, and not copies: a second set of them may not fit on the device.
    """
    return {
        str(block): {
            "origin": list(block.origin),
            "shape": list(block.shape),
            **stack.block_state(slot),
            **keeper.block_state(slot),
        }
        for group in groups
        for block, stack, keeper, slot in group.slots()
    }


def on_host(state: Any) -> Any:
    """A tree of dicts, lists, tensors and numbers with copies of the tensors, in host memory."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {key: on_host(value) for key, value in state.items()}
    return [on_host(value) for value in state] if isinstance(state, list) else state


def load_blocks(saved: Mapping[str, Any], units: Sequence[Unit]) -> None:
    """Takes back what `blocks_state` gave.

    Raises:
        SettingsError: if a block of this rank is missing; nothing is touched then.
    """
    blocks = [str(block) for unit in units for block, *_ in unit.sharded.slots()]
    missing = [block for block in blocks if block not in saved]
    if missing:
        raise SettingsError(
            f"the checkpoint lacks the factors of {len(missing)} of this rank's {len(blocks)} blocks, "
            f"{missing[0]} first: it was saved by another world size or another model"
        )
    for unit in units:
        for block, stack, keeper, slot in unit.sharded.slots():
            _load(block, stack, keeper, slot, saved[str(block)], unit.settings)


def header(units: Sequence[Unit]) -> dict[str, Any]:
    """What an index says of all blocks together: how they were cut, and each parameter's step count."""
    return {
        "settings": [unit.settings.model_dump(mode="json") for unit in units],
        "cut": _cuts(units),
        "steps": {
            name: int(state["step"])
            for unit in units
            for name, state in unit.sharded.states_by_name(unit.states).items()
            if "step" in state
        },
    }


def own_blocks(units: Sequence[Unit]) -> set[str]:
    """The names of this rank's blocks."""
    return {str(block) for unit in units for block, *_ in unit.sharded.slots()}


def check(units: Sequence[Unit], reader: BlockReader) -> None:
    """Holds a checkpoint's folder against this rank's blocks, and their files against their checksums.

    Raises:
        CheckpointError: naming the block that is missing or has another shape although blocks are cut as they
            were; or the file that is missing or damaged.
    """
    if reader.header.get("cut") == _cuts(units):
        for unit in units:
            for block, *_ in unit.sharded.slots():
                if not reader.holds(str(block), block.origin, block.shape):
                    raise CheckpointError(
                        f"{reader.folder}: has no block {block} of shape {block.shape}: it was saved of another model"
                    )
    reader.verify(own_blocks(units) & set(reader.blocks))


def restore(units: Sequence[Unit], reader: BlockReader) -> None:
    """Takes this rank's blocks and step counts from a checked folder; blocks that were cut otherwise start fresh."""
    fresh: list[str] = []
    for unit in units:
        for name, state in unit.sharded.states_by_name(unit.states).items():
            state["step"] = int(reader.header["steps"].get(name, state["step"]))
        for block, stack, keeper, slot in unit.sharded.slots():
            if reader.holds(str(block), block.origin, block.shape):
                _load(block, stack, keeper, slot, reader.read(str(block)), unit.settings)
            else:
                fresh.append(str(block))
    if fresh:
        logger.warning(
            "%d of this rank's %d blocks were cut otherwise in the checkpoint and start fresh, %s first",
            len(fresh), len(own_blocks(units)), fresh[0],
        )  # fmt: skip


def with_present_settings(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A checkpoint's param groups with the job's present settings, except for what a scheduler has made of `lr`."""
    return [
        {**{key: value for key, value in present.items() if key != "params"}, **_kept(saved)}
        for saved, present in zip(state_dict["param_groups"], groups, strict=True)
    ]


def with_all_settings(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A checkpoint's param groups; a setting that the release which made it did not have is the present one."""
    return [
        {**{key: present[key] for key in GroupSettings.model_fields}, **saved}
        for saved, present in zip(state_dict["param_groups"], groups, strict=True)
    ]


def _kept(saved: Mapping[str, Any]) -> dict[str, Any]:
    return {key: saved[key] for key in ("params", "lr", "initial_lr") if key in saved}


def _cuts(units: Sequence[Unit]) -> list[dict[str, Any]]:
    """The settings by which blocks are cut, of each param group once."""
    cuts = [{key: getattr(unit.settings, key) for key in _STRUCTURAL} for unit in units]
    return [cut for number, cut in enumerate(cuts) if cut not in cuts[:number]]


def _load(
    block: Block,
    stack: ShampooPreconditioner,
    keeper: RootKeeper,
    slot: int,
    state: Mapping[str, Any],
    settings: GroupSettings,
) -> None:
    stack.load_block_state(slot, state)
    keeper.load_block_state(slot, state, settings)


def check_fits(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Holds a checkpoint against the optimizer's present param groups, before anything is touched.

    Raises:
        SettingsError: for a checkpoint of another optimizer or of other blocks.
    """
    if "blocks" not in state_dict:
        raise SettingsError("this is not a state of Shampoo: it has no 'blocks'")
    for saved, present in zip(state_dict["param_groups"], groups, strict=False):
        for key in GroupSettings.model_fields:
            before, now = saved.get(key), present[key]
            if before == now or (isinstance(before, list) and tuple(before) == now):
                continue
            if key in _STRUCTURAL:
                raise SettingsError(f"Shampoo setting '{key}' = {now!r}: the checkpoint was made with {before!r}")
            if key != "lr":
                logger.warning("'%s' is %r from the checkpoint, not the present %r", key, before, now)


def restore_exactly(
    state: Mapping[Tensor, dict[str, Any]], state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Puts back the fp32 state that torch's own loading has cast to the parameters' dtype.

    A step count that another optimizer kept as a tensor becomes a number, which no step has to fetch from a device.

    Args:
        state: the optimizer's, by parameter; changed in place.
    """
    params = [param for group in groups for param in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    for number, param in zip(numbers, params, strict=True):
        for key, value in state_dict["state"].get(number, {}).items():
            if key == "step":
                state[param][key] = int(value)
            elif isinstance(value, Tensor):
                state[param][key] = value.detach().to(param.device, copy=True)
