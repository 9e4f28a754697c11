"""How Megatron's own optimizers lay parameters out: whole, as fp32 copies, layer by layer, or in flat shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ds_shampoo.algorithm.blocks import Section
from ds_shampoo.frameworks.megatron.internals import Run
from ds_shampoo.frameworks.megatron.names import ModelParameter
from ds_shampoo.frameworks.megatron.slicing import sections
from ds_shampoo.sharding.fragments import Fragment
from ds_shampoo.sharding.gathering import gathered
from ds_shampoo.sharding.layout import Layout
from ds_shampoo.sharding.model_order import Rounds, concatenated_over_ranks, union_over_ranks
from ds_shampoo.sharding.partition import LogicalParameter, Partition

_Said = TypeVar("_Said")


class MegatronLayout(Layout):
    """One for all of Megatron's ways: every rank says which runs it holds, and all ranks hear it.

    A rank may hold nothing of a param group, and own blocks of it all the same.

    Attributes:
        replicas: the ranks over which the parameters are replicated or sharded: data and context parallel.
        slices: the tensor-parallel ranks.
    """

    keeps_blocks_apart = True
    steps_empty = True

    def __init__(
        self,
        parameters: Mapping[int, ModelParameter],
        runs: Callable[[], Mapping[int, Run]],
        replicas: dist.ProcessGroup,
        slices: dist.ProcessGroup,
    ) -> None:
        """`parameters` are the model's, by id, and `runs` gives what `runs_of` does, once Megatron has laid out."""
        self._parameters, self._runs = parameters, runs
        self.replicas, self.slices = replicas, slices

    def name(self, name: str, parameter: Tensor) -> str:
        return self._parameters[id(parameter)].name

    def sections(self, name: str, parameter: Tensor) -> Sequence[Section] | None:
        known = self._parameters[id(parameter)]
        return sections(
            known.chunk,
            known.local_name,
            parameter,
            rank=dist.get_rank(self.slices),
            world_size=dist.get_world_size(self.slices),
        )

    def over_ranks(self, own: Sequence[_Said]) -> Sequence[_Said]:
        return concatenated_over_ranks(own)

    def everyones(self, rounds: Rounds) -> Rounds:
        return union_over_ranks(rounds)

    def partition(self, members: Sequence[LogicalParameter], stand_ins: Sequence[Tensor]) -> Partition:
        names = {id(member.tensor): member.name for member in members}
        rank, world_size = dist.get_rank(self.replicas), dist.get_world_size(self.replicas)
        own: list[Fragment] = []
        runs = self._runs()
        for buffer, tensor in enumerate(stand_ins):
            parameter, start = runs[id(tensor)]
            name = names[id(parameter)]
            present = parameter.detach().view(-1)[start : start + tensor.numel()]
            if not torch.equal(tensor.detach().view(-1).to(parameter.dtype), present):
                raise RuntimeError(
                    f"Shampoo can't read this Megatron's layout: the fp32 weights found for '{name}' are not its own"
                )
            own.append(Fragment(name, start, tensor.numel(), rank, buffer, 0))
        everyones = gathered(own, self.replicas)
        return Partition([fragment for run in everyones for fragment in run], rank, world_size, self.replicas)
