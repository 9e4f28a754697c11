"""Partition: how one param group lies over the ranks of its data-parallel group, as a host framework left it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ds_shampoo.algorithm.blocks import Section
from ds_shampoo.algorithm.selection import Role
from ds_shampoo.sharding.fragments import Fragment
from ds_shampoo.sharding.model_order import Rounds

_Said = TypeVar("_Said")


@dataclass(frozen=True)
class LogicalParameter:
    """A parameter as the user passed it, before any framework replaced it.

    Attributes:
        name: its name in the model, or "param_<number>".
        tensor: the parameter itself.
        shape: its full shape.
        role: what it is taken for.
        excluded: whether the user said `preconditioned: false`.
        sections: those of the whole matrix of which `shape` is a tensor-parallel rank's slice; None where it is whole.
        unfit: what keeps it from being trained, as a quantised weight that nobody trains; empty for an ordinary one.
        vocabulary_dim: of an embedding or head, the dimension over the vocabulary: 0, -1, or None for neither.
        batch: so many independent matrices lie one after another in it, as a layer's experts do.
    """

    name: str
    tensor: Tensor
    shape: tuple[int, ...]
    role: Role
    excluded: bool
    sections: Sequence[Section] | None = None
    unfit: str = ""
    vocabulary_dim: int | None = 0
    batch: int = 1


@dataclass(frozen=True)
class Partition:
    """Where the elements of a group's parameters lie.

    Attributes:
        fragments: those of all ranks, in an order that all ranks share.
        rank, world_size: of this process in `process_group`.
        process_group: the group's data-parallel ranks; None for a single process.
    """

    fragments: Sequence[Fragment]
    rank: int = 0
    world_size: int = 1
    process_group: dist.ProcessGroup | None = None


class Layout(Protocol):
    """Turns what a host framework did to the parameters into fragments; one implementation per way of doing it.

    A framework steps a param group whole, or in parts that it calls `step` for one after the other (ZeRO-3's
    sub-groups); `stand_ins` is what stands in the group at such a step.

    Attributes:
        keeps_blocks_apart: the framework's checkpoints have the blocks in files of their own, outside `state_dict`.
        steps_empty: a group that lies on other ranks only is stepped all the same, since this one may own its blocks.
    """

    keeps_blocks_apart: bool
    steps_empty: bool

    def in_training(self) -> bool:
        """False while the framework calls `step` only to have state allocated, as DeepSpeed does in set-up."""

    def device(self, parameter: Tensor) -> torch.device:
        """Where blocks are kept and preconditioned: that of the model's compute, wherever shards lie."""

    def name(self, name: str, parameter: Tensor) -> str:
        """A parameter's name among those of all ranks, from its name in this rank's model."""

    def sections(self, name: str, parameter: Tensor) -> Sequence[Section] | None:
        """The sections of a matrix of which this rank may hold a slice only; None for what every rank has whole."""

    def over_ranks(self, own: Sequence[_Said]) -> Sequence[_Said]:
        """What every rank of the job says, where ranks have different parts of the model; all ranks ask at once."""

    def everyones(self, rounds: Rounds) -> Rounds:
        """This rank's blocks together with those that other ranks have, in the model's order; all ranks ask at once."""

    def parts(self, index: int) -> Sequence[Tensor] | None:
        """The tensors that stand for a param group, each stepped by itself; None where it is stepped whole.

        Args:
            index: the group's, among those that have parameters.
        """

    def absent(self, tensor: Tensor) -> bool:
        """Whether a tensor that is stepped has been moved out of memory until its step."""

    def members(self, originals: Sequence[LogicalParameter], stand_ins: Sequence[Tensor]) -> Sequence[LogicalParameter]:
        """Those of a param group's original parameters that `stand_ins` stands for."""

    def partition(self, members: Sequence[LogicalParameter], stand_ins: Sequence[Tensor]) -> Partition:
        """Maps original parameters to the tensors that stand for them.

        Raises:
            RuntimeError: if the two can't be brought together; training would go wrong without a sign.
        """


class WholeLayout:
    """One process, every parameter whole: Shampoo as an ordinary torch optimizer."""

    keeps_blocks_apart = False
    steps_empty = False

    def in_training(self) -> bool:
        return True

    def device(self, parameter: Tensor) -> torch.device:
        return parameter.device

    def name(self, name: str, parameter: Tensor) -> str:
        return name

    def sections(self, name: str, parameter: Tensor) -> None:
        return None

    def over_ranks(self, own: Sequence[_Said]) -> Sequence[_Said]:
        return own

    def everyones(self, rounds: Rounds) -> Rounds:
        return rounds

    def parts(self, index: int) -> None:
        return None

    def absent(self, tensor: Tensor) -> bool:
        return False

    def members(self, originals: Sequence[LogicalParameter], stand_ins: Sequence[Tensor]) -> Sequence[LogicalParameter]:
        return originals

    def partition(self, members: Sequence[LogicalParameter], stand_ins: Sequence[Tensor]) -> Partition:
        if [id(parameter.tensor) for parameter in members] != [id(tensor) for tensor in stand_ins]:
            raise RuntimeError(
                "the parameters of a param group were replaced after Shampoo was constructed; under DeepSpeed "
                "select Shampoo in the JSON's optimizer section, or call ds_shampoo.initialize"
            )
        return Partition(whole_fragments(members, rank=0))


def check_agreement(value: int, what: str, partition: Partition, device: torch.device) -> None:
    """Compares a fingerprint over the group's ranks, once at start.

    Raises:
        RuntimeError: if it is another one on any rank, naming `what` it is of.
    """
    if partition.world_size > 1:
        extremes = torch.tensor([value, -value], dtype=torch.int64, device=device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=partition.process_group)
        if extremes.tolist() != [value, -value]:
            raise RuntimeError(f"the ranks of a data-parallel group disagree about {what}")


def whole_fragments(originals: Sequence[LogicalParameter], rank: int) -> list[Fragment]:
    """One fragment per parameter, each in a buffer of its own, as a rank holds them that shards nothing."""
    return [
        Fragment(parameter.name, 0, parameter.tensor.numel(), rank, buffer, 0)
        for buffer, parameter in enumerate(originals)
        if parameter.tensor.numel()
    ]
