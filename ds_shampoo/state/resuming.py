"""What of an optimizer's own state comes back from a checkpoint: settings, moments, and whether they fit."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.algorithm.preconditioners.defaults import GRAFTING
from ds_shampoo.algorithm.selection import Role
from ds_shampoo.config import GroupSettings, SettingsError
from ds_shampoo.sharding.partition import LogicalParameter
from ds_shampoo.sharding.table import cut_all
from ds_shampoo.state.nested import BLOCKS, check
from ds_shampoo.state.saving import STRUCTURAL

logger = logging.getLogger("ds_shampoo")

# What a stack of blocks is made by, beside how they are cut.
_BUILT_BY = (*STRUCTURAL, "preconditioner", "root_dtype", "statistics_of")
# A saved param group names under this key what was changed since it was made.
CHANGED = "changed"
# Changed by schedulers in most jobs, and a checkpoint's whatever it was before.
_ALWAYS = ("lr", "initial_lr")


def changed(group: Mapping[str, Any], constructed: Mapping[str, Any]) -> set[str]:
    """The keys of a param group that were changed or added since it was made."""
    return {key for key, value in group.items() if key != "params" and not same(value, constructed.get(key, group))}


def scheduled(group: Mapping[str, Any], constructed: Mapping[str, Any]) -> dict[str, Any]:
    """What of a param group a checkpoint brings back into a job with other settings."""
    keys = changed(group, constructed) | {key for key in _ALWAYS if key in group}
    return {key: group[key] for key in sorted(keys)}


def _of_today(group: Mapping[str, Any]) -> dict[str, Any]:
    """A saved param group; earlier releases had no word for what was the same for all.

    That is Shampoo's direction, statistics of gradients, and, as None too, directions as long as the grafting steps and
    embeddings at the rate of all.
    """
    found = {"preconditioner": "shampoo", "statistics_of": "gradients", **group}
    for key, value in (("direction_rms", GRAFTING), ("embedding_lr_scale", 1.0)):
        if found.get(key) is None:
            found[key] = value
    return found


def with_present_settings(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], constructed: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A checkpoint's param groups with the settings that the job's were made with, but for what was changed since.

    What a scheduler made of them after the save, in a job that rolls back, is gone. Those that the checkpoint's job was
    made with otherwise are logged: by its JSON, or by an earlier release's defaults.
    """
    found = list(map(_of_today, state_dict["param_groups"]))
    _tell_differences(found, constructed)
    return [
        {
            **{key: value for key, value in present.items() if key != "params"},
            **{key: made[key] for key in GroupSettings.model_fields if key in made},
            **{key: saved[key] for key in ("params", *_ALWAYS, *saved.get(CHANGED, ())) if key in saved},
        }
        for saved, present, made in zip(found, groups, constructed, strict=True)
    ]


def _tell_differences(found: Sequence[Mapping[str, Any]], constructed: Sequence[Mapping[str, Any]]) -> None:
    messages = [
        f"'{key}' is {made[key]!r} from this job's settings, not {saved[key]!r} as in the job that saved the checkpoint"
        for saved, made in zip(found, constructed, strict=True)
        for key in GroupSettings.model_fields
        if key in saved and key in made and key not in (*_ALWAYS, *saved.get(CHANGED, ()))
        if not same(saved[key], made[key])
    ]
    for message in dict.fromkeys(messages):
        logger.warning(message)


def adapted(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    logical: Sequence[Sequence[LogicalParameter]],
) -> dict[str, Any]:
    """A state with all of the checkpoint's settings; one that its release did not have is the present one.

    Raises:
        SettingsError: if it is not Shampoo's, its blocks were cut with other settings, or one does not fit.
    """
    check_groups(state_dict, groups)
    state_dict = {**state_dict, "param_groups": [_of_today(group) for group in state_dict["param_groups"]]}
    check_fits(state_dict, groups)
    whole = [
        {**{key: present[key] for key in GroupSettings.model_fields}, **saved}
        for saved, present in zip(state_dict["param_groups"], groups, strict=True)
    ]
    check_blocks(state_dict, whole, logical)
    return {**state_dict, "param_groups": whole}


def told(state_dict: Mapping[str, Any]) -> dict[str, object]:
    """What ranks that load one state together have to have in common: the step counts and the settings."""
    counts = {
        f"the step count of parameter {number} in the state": int(entry.get("step", 0)) if entry else 0
        for number, entry in state_dict["state"].items()
    }
    settings = {
        f"'{key}' of param group {index} in the state": group[key]
        for index, group in enumerate(state_dict["param_groups"])
        for key in GroupSettings.model_fields
    }
    return counts | settings


def check_groups(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Holds a state's param groups against the present ones.

    Raises:
        SettingsError: where there are more or fewer, or one has more or fewer parameters.
    """
    saved = state_dict.get("param_groups")
    if saved is None or "state" not in state_dict:
        raise SettingsError("this is not an optimizer's state: it has no 'state' and 'param_groups'")
    if len(saved) != len(groups):
        raise SettingsError(f"the checkpoint has {len(saved)} param groups, but this optimizer has {len(groups)}")
    for number, (before, now) in enumerate(zip(saved, groups, strict=True)):
        if len(before["params"]) != len(now["params"]):
            raise SettingsError(
                f"param group {number} has {len(before['params'])} parameters in the checkpoint, but "
                f"{len(now['params'])} here"
            )


def check_fits(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Holds a checkpoint's settings against the optimizer's present param groups, before anything is touched.

    Raises:
        SettingsError: for a checkpoint of another optimizer or of other blocks.
    """
    for saved, present in zip(state_dict["param_groups"], groups, strict=True):
        if "block_size" not in saved:
            raise SettingsError("this is not a state of Shampoo: its param groups have no 'block_size'")
        for key in GroupSettings.model_fields:
            if key not in saved or same(saved[key], present[key]):
                continue
            before, now = saved[key], present[key]
            if key in STRUCTURAL:
                raise SettingsError(f"Shampoo setting '{key}' = {now!r}: the checkpoint was made with {before!r}")
            if key != "lr":
                logger.warning("'%s' is %r from the checkpoint, not the present %r", key, before, now)


def check_structure(built: GroupSettings, present: GroupSettings) -> None:
    """Refuses settings that decide what blocks there are, changed while there are blocks.

    Raises:
        SettingsError: naming the setting.
    """
    for key in _BUILT_BY:
        before, now = getattr(built, key), getattr(present, key)
        if before != now:
            raise SettingsError(
                f"Shampoo setting '{key}' = {now!r}: it was {before!r} when the blocks were built, and can't change "
                "while they are there; set it where the optimizer is made"
            )


def check_preconditioned(group: Mapping[str, Any], constructed: Mapping[str, Any]) -> None:
    """Refuses to turn preconditioning on or off in mid-run.

    Raises:
        SettingsError: saying so.
    """
    before, now = constructed.get("preconditioned", True), group.get("preconditioned", True)
    if before != now:
        raise SettingsError(
            f"param group key 'preconditioned' = {now!r}: it was {before!r} when the optimizer was made, and can't "
            "change"
        )


def check_blocks(
    state_dict: Mapping[str, Any],
    saved_groups: Sequence[Mapping[str, Any]],
    logical: Sequence[Sequence[LogicalParameter]],
) -> None:
    """Looks at every block of every parameter that has state.

    Raises:
        SettingsError: naming the first that is missing or does not fit.
    """
    missing, count = [], 0
    for parameters, group in zip(logical, saved_groups, strict=True):
        settings = GroupSettings.model_construct(**{key: group[key] for key in GroupSettings.model_fields})
        for parameter, number in zip(parameters, group["params"], strict=True):
            state = state_dict["state"].get(number) or {}
            if not state or (BLOCKS not in state and not parameter.tensor.requires_grad):
                continue
            found = {str(key): block for key, block in state.get(BLOCKS, {}).items()}
            for block in cut_all([parameter], settings):
                count += 1
                if str(block.index) in found:
                    _check_block(block, found[str(block.index)], parameter)
                else:
                    missing.append(str(block))
    if missing:
        raise SettingsError(
            f"the checkpoint lacks the factors of {len(missing)} of this rank's {count} blocks, {missing[0]} first: it "
            "was saved by another world size or another model"
        )


def _check_block(block: Block, found: Mapping[str, Any], parameter: LogicalParameter) -> None:
    """As `nested.check`; of what was one matrix once, and is cut otherwise since, it names the setting that cuts it so.

    Raises:
        SettingsError: if the block can't have this state.
    """
    try:
        check(block, found)
    except SettingsError as error:
        if parameter.parts is None and parameter.role is not Role.LORA:
            raise
        setting = (
            f'roles = {{"{parameter.name}": "weight"}}'
            if parameter.parts is None
            else f'fused_parts = {{"{parameter.name}": 1}}'
        )
        raise SettingsError(f"{error} If it was saved when this was one matrix, set {setting}") from error


def parameters_with_blocks(
    state_dict: Mapping[str, Any], logical: Sequence[Sequence[LogicalParameter]]
) -> list[set[str]]:
    """By param group, the names of the parameters that have blocks in a state."""
    return [
        {
            parameter.name
            for parameter, number in zip(parameters, group["params"], strict=True)
            if (state_dict["state"].get(number) or {}).get(BLOCKS)
        }
        for parameters, group in zip(logical, state_dict["param_groups"], strict=True)
    ]


def without_blocks(state: Any) -> Any:
    """A parameter's entry as torch's own loading may take it: it would round factors to the parameter's dtype."""
    return {key: value for key, value in state.items() if key != BLOCKS} if isinstance(state, Mapping) else state


def restore_exactly(
    state: Mapping[Tensor, dict[str, Any]], state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Puts back the fp32 state that torch's own loading has cast to the parameters' dtype, and the blocks.

    A step count that another optimizer kept as a tensor becomes a number, which no step has to fetch from a device.

    Args:
        state: the optimizer's, by parameter; changed in place.
    """
    params = [param for group in groups for param in group["params"]]
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    for number, param in zip(numbers, params, strict=True):
        for key, value in (state_dict["state"].get(number) or {}).items():
            if key == "step":
                state[param][key] = int(value)
            elif key == BLOCKS:
                state[param][key] = value
            elif isinstance(value, Tensor):
                state[param][key] = value.detach().to(param.device, copy=True)


def same(a: Any, b: Any) -> bool:
    """Whether two values of a setting are equal; a list and a tuple of the same numbers are."""
    a, b = (tuple(value) if isinstance(value, list) else value for value in (a, b))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))
    return bool(a == b)
