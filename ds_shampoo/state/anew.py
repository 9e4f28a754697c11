"""Param groups that are there already, read anew for the layout of a framework that is to step them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ds_shampoo.config import SettingsError, ShampooConfig
from ds_shampoo.parameters.reading import Parameters
from ds_shampoo.state.group_records import GroupRecords
from ds_shampoo.step.subgroups import Subgroups


def read_anew(
    groups: Sequence[Mapping[str, Any]],
    parameters: Parameters,
    *,
    config: ShampooConfig,
    before: Subgroups,
    records: GroupRecords,
    names: Mapping[int, str],
) -> tuple[Subgroups, GroupRecords]:
    """What is stepped together, and the param groups' records, without any state.

    Args:
        groups: those that are there; empty ones may have been taken out.
        parameters: of the new layout.
        before, records: of the former layout; they stay as they are.
        names: those that were passed with parameters, by the parameter's id.

    Raises:
        SettingsError: if there is state, if other tensors stand in a group than it was made with, and for what does
            not fit as at construction.
    """
    steps = max((subgroup.sharded.last_step for subgroup in before.all), default=0)
    if steps:
        raise SettingsError(
            f"the Shampoo object has the state of {steps} steps, which would be lost: make a new object, and load the "
            "state of a checkpoint into the engine"
        )
    subgroups = Subgroups(config, parameters.layout, parameters.model_order)
    found = records.over(subgroups)
    present = {group["group_index"]: group for group in groups}
    for index, (made, logical) in enumerate(zip(records.all_made, before.logical, strict=True)):
        group = present.get(index, {**made, "params": []})
        if {id(parameter.tensor) for parameter in logical} != {id(tensor) for tensor in group["params"]}:
            raise SettingsError(
                f"other tensors stand in param group {index} than the Shampoo object was made with, as those of "
                "another engine: make a new object"
            )
        members = [(names.get(id(tensor)), tensor) for tensor in group["params"]]
        subgroups.add(parameters.group(members, made, subgroups.logical), found.settings(group))
    parameters.check_patterns(subgroups.logical)
    return subgroups, found
