"""What a checkpoint holds beside torch's own optimizer state, and whether one fits the optimizer that loads it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ds_shampoo.config import GroupSettings, SettingsError
from ds_shampoo.group import ShardedGroup

logger = logging.getLogger("ds_shampoo")

# Settings that decide which blocks there are; a checkpoint made with others can't be taken up.
_STRUCTURAL = ("block_size", "max_preconditioner_dim", "merge_small_dims", "embedding")


def blocks_state(groups: Iterable[ShardedGroup]) -> dict[str, Any]:
    """The factors, roots and jobs under way of this rank's blocks, by block name; plain tensors and numbers."""
    return {
        str(block): {**stack.block_state(slot), **keeper.block_state(slot)}
        for group in groups
        for block, stack, keeper, slot in group.slots()
    }


def load_blocks(saved: Mapping[str, Any], groups: Sequence[tuple[ShardedGroup, GroupSettings]]) -> None:
    """Takes back what `blocks_state` gave.

    Raises:
        SettingsError: if a block of this rank is missing; nothing is touched then.
    """
    blocks = [str(block) for group, _ in groups for block, *_ in group.slots()]
    missing = [block for block in blocks if block not in saved]
    if missing:
        raise SettingsError(
            f"the checkpoint lacks the factors of {len(missing)} of this rank's {len(blocks)} blocks, "
            f"{missing[0]} first: it was saved by another world size or another model, or at ZeRO stage 0, "
            "where DeepSpeed keeps rank 0's optimizer only"
        )
    for group, settings in groups:
        for block, stack, keeper, slot in group.slots():
            stack.load_block_state(slot, saved[str(block)])
            keeper.load_block_state(slot, saved[str(block)], settings)


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

    Args:
        state: the optimizer's, by parameter; changed in place.
    """
    params = [param for group in groups for param in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    for number, param in zip(numbers, params, strict=True):
        for key, value in state_dict["state"].get(number, {}).items():
            if isinstance(value, Tensor):
                state[param][key] = value.detach().to(param.device, copy=True)
