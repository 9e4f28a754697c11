"""The blocks of all ranks together, for `state_dict` where each rank has its own only, until a step makes them old."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

from ds_shampoo.state.nested import BLOCKS
from ds_shampoo.state.shown import in_full, with_blocks
from ds_shampoo.step.sharded_group import ShardedGroup
from ds_shampoo.step.subgroups import BoundSubgroup

_HOST = torch.device("cpu")


class _Share(NamedTuple):
    """The blocks of one parameter that one rank owns."""

    subgroup: BoundSubgroup
    parameter: str
    owner: int


class Consolidation:
    """What was gathered last, as `ZeroRedundancyOptimizer` keeps it: on the host, by parameter and block."""

    def __init__(self) -> None:
        self._blocks: dict[str, dict[str, Any]] | None = None
        self._of: list[ShardedGroup] = []

    def forget(self) -> None:
        """The blocks have changed, or there are others."""
        self._blocks, self._of = None, []

    def gather(self, subgroups: Sequence[BoundSubgroup], to: int | None) -> None:
        """Gathers the blocks of all ranks, one rank's of one parameter after another; all ranks call this at once.

        Args:
            to: the rank that keeps them, of those that share the blocks; None for all of them.

        Raises:
            ValueError: for a rank that there is not.
        """
        self.forget()
        shares = list(_shares(subgroups))
        if not shares:
            return
        ranks = {share.subgroup.sharded.table.partition.world_size for share in shares}
        if to is not None and not all(0 <= to < world_size for world_size in ranks):
            raise ValueError(f"consolidate_state_dict(to={to!r}): must be a rank from 0 to {max(ranks) - 1}, or None")
        blocks: dict[str, dict[str, Any]] = {}
        for share in shares:
            partition = share.subgroup.sharded.table.partition
            sent = _sent(share)
            if to is None or to == partition.rank:
                blocks.setdefault(share.parameter, {}).update(sent)
        if all(to is None or to == share.subgroup.sharded.table.partition.rank for share in shares):
            self._blocks = {
                name: {number: found[number] for number in sorted(found, key=int)} for name, found in blocks.items()
            }
        self._of = [subgroup.sharded for subgroup in subgroups]

    def check(self, subgroups: Sequence[BoundSubgroup]) -> None:
        """Whether this rank has all blocks as they are now.

        Raises:
            RuntimeError: if it has its own only.
        """
        if not any(_shared(subgroup) for subgroup in subgroups):
            return
        if self._blocks is None or self._of != [subgroup.sharded for subgroup in subgroups]:
            raise RuntimeError(
                "this rank has its own blocks only, and state_dict() needs those of all ranks as the last step left "
                "them: call consolidate_state_dict() on all ranks first, or consolidate_state_dict(to=RANK) where one "
                "rank saves"
            )

    def completed(
        self, state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], subgroups: Sequence[BoundSubgroup]
    ) -> dict[str, Any]:
        """A state as torch makes it, with all blocks of every parameter in its entry.

        What was gathered is on the host, and then so is all else: torch's tools want a state on one device.

        Args:
            groups: the param groups, in whose order torch numbers parameters.
        """
        whole = with_blocks(state_dict, groups, [each for each in subgroups if not _shared(each)])
        if not any(_shared(subgroup) for subgroup in subgroups):
            return whole
        assert self._blocks is not None, "`check` comes first"
        numbers = {param: number for number, param in enumerate(p for group in groups for p in group["params"])}
        state = dict(whole["state"])
        for subgroup in filter(_shared, subgroups):
            for name, param in zip(subgroup.subgroup.names, subgroup.stand_ins, strict=True):
                if name in self._blocks:
                    state[numbers[param]] = {**state[numbers[param]], BLOCKS: self._blocks[name]}
        return {**whole, "state": tree_map(_on_host, state)}


def _on_host(leaf: Any) -> Any:
    return leaf.to(_HOST) if isinstance(leaf, torch.Tensor) else leaf


def _shared(subgroup: BoundSubgroup) -> bool:
    """Whether other ranks have some of its blocks."""
    return subgroup.sharded.plan.moves


def _shares(subgroups: Sequence[BoundSubgroup]) -> Iterator[_Share]:
    """In an order that all ranks share."""
    for subgroup in filter(_shared, subgroups):
        table = subgroup.sharded.table
        pairs = {(block.parameter, owner) for block, owner in zip(table.blocks, table.owners, strict=True)}
        yield from (_Share(subgroup, parameter, owner) for parameter, owner in sorted(pairs))


def _sent(share: _Share) -> dict[str, Any]:
    """A share as its owner has it, by the blocks' numbers, on every rank."""
    sharded, own = share.subgroup.sharded, share.subgroup.sharded.table.partition
    message: list[dict[str, Any]] = [{}]
    if own.rank == share.owner:
        message = [in_full(sharded, share.parameter, share.subgroup.settings, _HOST)]
    assert own.process_group is not None, "blocks are shared by a process group's ranks"
    source = dist.get_global_rank(own.process_group, share.owner)
    dist.broadcast_object_list(message, src=source, group=own.process_group)
    return message[0]
