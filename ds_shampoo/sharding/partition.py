"""Partition: how one param group lies over the ranks of its data-parallel group, as a host framework left it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ds_shampoo.algorithm.blocks import Parts, Section
from ds_shampoo.algorithm.selection import Role
from ds_shampoo.sharding.fragments import Fragment


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
        rank_dim: of a LoRA factor, the dimension over the rank: 0 or -1; None for anything else.
        parts: the matrices that are fused in it, or in each of its batch; None for one matrix, or with `sections`.
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
    rank_dim: int | None = None
    parts: Parts | None = None


@dataclass(frozen=True)
class Partition:
    """Where the elements of a group's parameters lie.

    Attributes:
        fragments: those of all ranks, in an order that all ranks share.
        rank, world_size: of this process in `process_group`.
        process_group: the group's data-parallel ranks; None for a single process.
        missing_alike: a parameter without gradient has none on any of these ranks, and takes no part in a step.
            Elsewhere it may be missing on this rank alone, and counts as zero.
    """

    fragments: Sequence[Fragment]
    rank: int = 0
    world_size: int = 1
    process_group: dist.ProcessGroup | None = None
    missing_alike: bool = False


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


def replicated(parameters: Sequence[LogicalParameter], group: dist.ProcessGroup, missing_alike: bool) -> Partition:
    """Every rank of a group holds every parameter whole, each in a buffer of its own."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    fragments = [fragment for each in range(world_size) for fragment in whole_fragments(parameters, each)]
    return Partition(fragments, rank, world_size, group, missing_alike)
