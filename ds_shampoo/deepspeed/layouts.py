"""How ZeRO's stages 0, 1 and 2 lay a param group out over the data-parallel ranks, read from the tensors themselves."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_shampoo.sharding.fragments import Fragment
from ds_shampoo.sharding.partition import Layout, LogicalParameter, Partition, whole_fragments


def layout_for(engine: Any) -> Layout:
    """The layout of the engine's ZeRO stage."""
    return FlatLayout(engine) if engine.zero_optimization_stage() else ReplicatedLayout(engine)


class _EngineLayout:
    """What all layouts under an engine share."""

    def __init__(self, engine: Any) -> None:
        self._engine = weakref.ref(engine)

    def in_training(self) -> bool:
        """False until the engine has its optimizer: a wrapper may take a step on zero gradients to allocate state."""
        engine = self._engine()
        return engine is not None and engine.optimizer is not None


class ReplicatedLayout(_EngineLayout):
    """Stage 0: every rank holds every parameter whole, as itself or as an fp32 master copy of it."""

    def partition(self, originals: Sequence[LogicalParameter], held: Sequence[Tensor]) -> Partition:
        trained = originals
        if len(held) != len(originals):  # master copies are made of what is trained, in the same order
            trained = [p for p in originals if p.tensor.requires_grad and p.tensor.numel()]
        if [tuple(tensor.shape) for tensor in held] != [parameter.shape for parameter in trained]:
            raise _misread("the master copies do not have the parameters' shapes")
        for parameter, tensor in zip(trained, held, strict=True):
            _prove(parameter, tensor, parameter.tensor)
        engine = self._engine()
        assert engine is not None
        group = engine.seq_data_parallel_group
        ranks = range(dist.get_world_size(group))
        fragments = [
            fragment
            for rank in ranks
            for fragment, parameter in zip(whole_fragments(trained, rank), _nonempty(trained), strict=True)
            if parameter.tensor.requires_grad
        ]
        return Partition(fragments, dist.get_rank(group), len(ranks), group)


class FlatLayout(_EngineLayout):
    """Stages 1 and 2 and BF16_Optimizer: one flat fp32 tensor per group, this rank's equal share of the group.

    ZeRO makes the low-precision parameters views into one flat buffer of which the shares are consecutive parts.
    A parameter's address therefore tells its place, whatever `round_robin_gradients` or `parameter_alignment`
    did to the order and padding.
    """

    def partition(self, originals: Sequence[LogicalParameter], held: Sequence[Tensor]) -> Partition:
        trained = [p for p in originals if hasattr(p.tensor, "_hp_mapping") and p.tensor.numel()]
        if len(held) != 1 or held[0].dim() != 1 or not trained:
            raise _misread(f"expected one flat tensor per param group, found {[tuple(t.shape) for t in held]}")
        flat, group = held[0], trained[0].tensor._dp_group  # type: ignore[attr-defined]
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        base = min(parameter.tensor.data_ptr() for parameter in trained)
        fragments = [
            fragment for parameter in trained for fragment in _shares(parameter, base, flat.numel(), world_size)
        ]
        by_name = {parameter.name: parameter for parameter in trained}
        for fragment in fragments:
            if fragment.rank == rank:
                parameter = by_name[fragment.parameter]
                share = flat.narrow(0, fragment.offset, fragment.numel)
                _prove(parameter, share, parameter.tensor.view(-1).narrow(0, fragment.start, fragment.numel))
        return Partition(fragments, rank, world_size, group)


def _shares(parameter: LogicalParameter, base: int, size: int, world_size: int) -> list[Fragment]:
    """A parameter's runs in the shares of all ranks, from its address in the flat buffer."""
    tensor = parameter.tensor
    begin, remainder = divmod(tensor.data_ptr() - base, tensor.element_size())
    end = begin + tensor.numel()
    if remainder or end > size * world_size or not tensor.is_contiguous():
        raise _misread(f"parameter '{parameter.name}' does not lie in its group's flat buffer")
    return [
        Fragment(parameter.name, start - begin, stop - start, rank, 0, start - rank * size)
        for rank in range(begin // size, (end - 1) // size + 1)
        if (start := max(begin, rank * size)) < (stop := min(end, (rank + 1) * size))
    ]


def _prove(parameter: LogicalParameter, master: Tensor, present: Tensor) -> None:
    """Holds a reading of the layout against the data: a master weight, rounded, is the weight that the model uses."""
    if not torch.equal(master.detach().to(present), present.detach()):
        raise _misread(f"the fp32 master weights found for '{parameter.name}' are not that parameter's")


def _nonempty(parameters: Sequence[LogicalParameter]) -> list[LogicalParameter]:
    return [parameter for parameter in parameters if parameter.tensor.numel()]


def _misread(reason: str) -> RuntimeError:
    return RuntimeError(f"Shampoo can't read this DeepSpeed's layout of the optimizer's parameters: {reason}")
