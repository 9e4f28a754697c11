"""Blocks in `Optimizer.state`, where torch's tools look for them, and what others do to that state between steps."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_shampoo.config import GroupSettings, SettingsError
from ds_shampoo.state.nested import BLOCKS, check, from_nested, to_nested
from ds_shampoo.step.elementwise import MOMENTS
from ds_shampoo.step.sharded_group import ShardedGroup
from ds_shampoo.step.subgroups import BoundSubgroup

logger = logging.getLogger("ds_shampoo")


class _Shown(NamedTuple):
    """What stands in a parameter's entry, and whose blocks it shows."""

    sharded: ShardedGroup
    blocks: dict[str, Any]


class ShownBlocks:
    """Keeps `state[param]["blocks"]`: by the block's number its factors and roots, as they are.

    The state belongs to whoever holds the optimizer. An entry that is deleted, or whose moments are set to zero, takes
    the parameter's blocks along: they begin anew. Blocks that somebody else put there are taken up.
    """

    def __init__(self) -> None:
        self._shown: dict[Tensor, _Shown] = {}
        self._marks: dict[Tensor, list[tuple[Tensor, int]]] = {}

    def clear(self) -> None:
        """Forgets what is shown, for other blocks."""
        self._shown.clear()
        self._marks.clear()

    def follow(
        self, sharded: ShardedGroup, name: str, param: Tensor, state: dict[str, Any], *, settings: GroupSettings
    ) -> None:
        """Brings a parameter's blocks and its entry together again, before a step.

        Raises:
            SettingsError: for blocks in the entry that are not this parameter's.
        """
        _mend(state, param)
        if not sharded.owned_blocks_of(name):
            state.pop(BLOCKS, None)  # a checkpoint has those of all ranks
            return
        shown, present = self._shown.get(param), state.get(BLOCKS)
        if shown is not None and present is not shown.blocks and _is_copy(present, shown.blocks):
            present = state[BLOCKS] = shown.blocks
        known = shown is not None and present is shown.blocks
        if present is not None and not known:
            take_up(sharded, {name: present}, settings)
        elif shown is not None and shown.sharded is sharded and sharded.last_step > 0:
            if not known:
                self._restart(sharded, name, "lost its state")
            elif self._rewritten(param, state) and not any(bool(state[key].any()) for key in MOMENTS):
                self._restart(sharded, name, "had its moments set to zero")
        if not known or shown is None or shown.sharded is not sharded:
            state[BLOCKS] = _views(sharded, name)
            self._shown[param] = _Shown(sharded, state[BLOCKS])

    def note(self, subgroup: BoundSubgroup) -> None:
        """Remembers the moments as a step left them, of parameters that stand for themselves."""
        if subgroup.subgroup.names:
            for param, state in zip(subgroup.stand_ins, subgroup.states, strict=True):
                self._marks[param] = [(state[key], state[key]._version) for key in MOMENTS]

    def _rewritten(self, param: Tensor, state: Mapping[str, Any]) -> bool:
        """Whether somebody has written to the moments since, or put others in their place."""
        marks = self._marks.get(param, ())
        return any(
            state[key] is not moment or moment._version != version
            for key, (moment, version) in zip(MOMENTS, marks, strict=False)
        )

    def _restart(self, sharded: ShardedGroup, name: str, why: str) -> None:
        logger.warning("parameter '%s' %s: its blocks begin anew, without statistics and roots", name, why)
        sharded.restart({name})


def take_up(sharded: ShardedGroup, found: Mapping[str, Mapping[str, Any]], settings: GroupSettings) -> None:
    """Loads blocks in `to_nested`'s form, by parameter and number; all of them are looked at before any is loaded.

    Raises:
        SettingsError: for one that is missing or does not fit.
    """
    blocks = [owned for name in found for owned in sharded.owned_blocks_of(name)]
    missing = [str(owned.block) for owned in blocks if str(owned.block.index) not in found[owned.block.parameter]]
    if missing:
        raise SettingsError(
            f"the checkpoint lacks the factors of {len(missing)} of {len(blocks)} blocks, {missing[0]} first: it was "
            "saved of another model, or by ranks that had other blocks"
        )
    checked = []
    for owned in blocks:
        nested = found[owned.block.parameter][str(owned.block.index)]
        check(owned.block, nested)
        state = from_nested(nested)
        owned.check(state)
        checked.append((owned, state))
    for owned, state in checked:
        owned.load(state, settings)


def with_blocks(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], subgroups: Sequence[BoundSubgroup]
) -> dict[str, Any]:
    """A state as torch makes it, with the blocks of every parameter in its entry in full.

    Args:
        groups: the param groups, in whose order torch numbers parameters.
    """
    numbers = {param: number for number, param in enumerate(p for group in groups for p in group["params"])}
    state = dict(state_dict["state"])
    for subgroup in subgroups:
        for name, param in zip(subgroup.subgroup.names, subgroup.stand_ins, strict=True):
            if subgroup.sharded.owned_blocks_of(name):
                blocks = in_full(subgroup.sharded, name, subgroup.settings, param.device)
                state[numbers[param]] = {**state[numbers[param]], BLOCKS: blocks}
    return {**state_dict, "state": state}


def in_full(sharded: ShardedGroup, name: str, settings: GroupSettings, device: torch.device) -> dict[str, Any]:
    """A parameter's blocks in `to_nested`'s form, by number; tensors are those in use, but for jobs under way."""
    rooted = settings.root_refresh_threshold > 0
    return {str(owned.block.index): to_nested(owned.state(), rooted, device) for owned in sharded.owned_blocks_of(name)}


def _views(sharded: ShardedGroup, name: str) -> dict[str, Any]:
    return {
        str(owned.block.index): {
            key: {str(number): tensor[owned.slot] for number, tensor in enumerate(tensors)}
            for key in ("factors", "roots", "previous")
            if (tensors := getattr(owned.stack, key))
        }
        for owned in sharded.owned_blocks_of(name)
    }


def _is_copy(found: Any, shown: Any) -> bool:
    """Whether somebody has copied what was shown, as whoever moves a whole state does, and changed nothing."""
    if isinstance(found, Mapping) and isinstance(shown, Mapping):
        return found.keys() == shown.keys() and all(_is_copy(found[key], shown[key]) for key in shown)
    both = isinstance(found, Tensor) and isinstance(shown, Tensor) and found.shape == shown.shape
    return both and torch.equal(found.to(shown), shown)


def _mend(state: dict[str, Any], param: Tensor) -> None:
    """Moments as the step needs them, whatever somebody put there: fp32, contiguous, where the parameter is."""
    for key in MOMENTS:
        moment = state.get(key)
        if moment is None or (moment.is_meta and not param.is_meta):
            state[key] = torch.zeros(param.shape, dtype=torch.float32, device=param.device)
        elif moment.dtype != torch.float32 or moment.device != param.device or not moment.is_contiguous():
            state[key] = moment.to(param.device, torch.float32, memory_format=torch.contiguous_format)
    state.setdefault("step", 0)
