"""How ZeRO's stages lay a param group out over the data-parallel ranks, read from the tensors themselves."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ds_shampoo.algorithm.blocks import Section
from ds_shampoo.frameworks import protocols
from ds_shampoo.frameworks.deepspeed import internals
from ds_shampoo.frameworks.deepspeed.experts import global_name
from ds_shampoo.sharding.fragments import Fragment
from ds_shampoo.sharding.layout import Layout
from ds_shampoo.sharding.model_order import Rounds, concatenated_over_ranks, union_over_ranks
from ds_shampoo.sharding.partition import LogicalParameter, Partition, replicated

_Said = TypeVar("_Said")


class _Claim(NamedTuple):
    """That a parameter's elements from `start` on are those of a flat tensor, by its id, from `offset` on."""

    parameter: str
    start: int
    numel: int
    master: int
    offset: int


def layout_for(engine: Any) -> Layout:
    """The layout of the engine's ZeRO stage."""
    stage = engine.zero_optimization_stage()
    if stage == 3:
        return SubGroupLayout(engine)
    return FlatLayout(engine) if stage else ReplicatedLayout(engine)


class EngineLayout(Layout):
    """What all layouts under an engine share."""

    keeps_blocks_apart = True

    def __init__(self, engine: Any) -> None:
        self._engine = weakref.ref(engine)
        self._proved: set[_Claim] = set()

    def in_training(self) -> bool:
        """False until the engine has its optimizer: a wrapper may take a step on zero gradients to allocate state.

        Raises:
            RuntimeError: if there is no such engine any more, as after a failed `deepspeed.initialize`.
        """
        engine = self._engine()
        if engine is None:
            raise RuntimeError(
                "Shampoo was bound to a DeepSpeed engine that is gone, or was never finished: make a new optimizer"
            )
        return engine.optimizer is not None

    def is_of(self, engine: Any) -> bool:
        return self._engine() is engine

    def device(self, parameter: Tensor) -> torch.device:
        return torch.device(self._present_engine().device)

    def name(self, name: str, parameter: Tensor) -> str:
        """Asks the `mpu`, where it knows (that of GPTPipeline does)."""
        engine = self._present_engine()
        if protocols.names_parameters(engine.mpu):
            return str(engine.mpu.shampoo_name(engine.module, name))
        return global_name(engine.module, name, parameter)

    def sections(self, name: str, parameter: Tensor) -> Sequence[Section] | None:
        """Asks the `mpu`, where it knows (ds_shampoo.megatron.mpu does)."""
        engine = self._present_engine()
        mpu: object = engine.mpu
        return mpu.shampoo_sections(engine.module, name, parameter) if protocols.slices_parameters(mpu) else None

    def over_ranks(self, own: Sequence[_Said]) -> Sequence[_Said]:
        return concatenated_over_ranks(own) if internals.divides_the_model(self._present_engine()) else own

    def everyones(self, rounds: Rounds) -> Rounds:
        """Under pipeline, expert and tensor parallelism other ranks have other blocks; ranks are ordered by stage."""
        return union_over_ranks(rounds) if internals.divides_the_model(self._present_engine()) else rounds

    def _prove(self, parameter: LogicalParameter, *, start: int, master: Tensor, offset: int, present: Tensor) -> None:
        """Holds a reading of the layout against the data: master weights, rounded, are those that the model uses.

        Once it held, it stays proved: anyone may change masters alone afterwards (`safe_set_full_fp32_param`).

        Args:
            start: the first of the parameter's elements that are looked at.
            master: the tensor that stands for them, in which they begin at `offset`.
            present: these elements as the model uses them, flat.

        Raises:
            RuntimeError: saying what differs.
        """
        claim = _Claim(parameter.name, start, present.numel(), id(master), offset)
        if claim in self._proved:
            return
        found, present = master.detach().view(-1).narrow(0, offset, present.numel()), present.detach()
        if not torch.equal(found.to(present), present):
            raise _misread(_difference(parameter.name, found, present))
        self._proved.add(claim)

    def _present_engine(self) -> Any:
        engine = self._engine()
        assert engine is not None, "an optimizer does not outlive its engine"
        return engine


class ReplicatedLayout(EngineLayout):
    """Stage 0: every rank holds every parameter whole, as itself or as an fp32 master copy of it."""

    def partition(self, members: Sequence[LogicalParameter], stand_ins: Sequence[Tensor]) -> Partition:
        trained = members
        if len(stand_ins) != len(members):  # master copies are made of what is trained, in the same order
            trained = [p for p in members if p.tensor.requires_grad and p.tensor.numel()]
        if [tuple(tensor.shape) for tensor in stand_ins] != [parameter.shape for parameter in trained]:
            raise _misread("the master copies do not have the parameters' shapes")
        for parameter, tensor in zip(trained, stand_ins, strict=True):
            if tensor is not parameter.tensor:
                present = parameter.tensor.reshape(-1)
                self._prove(parameter, start=0, master=tensor, offset=0, present=present)
        return replicated(trained, self._replicas(members), missing_alike=False)

    def _replicas(self, members: Sequence[LogicalParameter]) -> dist.ProcessGroup:
        """The ranks that hold the same parameters: the data-parallel ones, or an expert's."""
        names = {internals.expert_group(parameter.tensor) for parameter in members}
        if len(names) > 1:
            raise RuntimeError(
                "a param group holds both experts and parameters that all ranks share; split it with "
                "deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer"
            )
        return internals.replicas(self._present_engine(), names.pop())


class FlatLayout(EngineLayout):
    """Stages 1 and 2 and BF16_Optimizer: one flat fp32 tensor per group, this rank's equal share of the group.

    ZeRO makes the low-precision parameters views into one flat buffer of which the shares are consecutive parts.
    A parameter's address therefore tells its place, whatever `round_robin_gradients` or `parameter_alignment`
    did to the order and padding.
    """

    def partition(self, members: Sequence[LogicalParameter], stand_ins: Sequence[Tensor]) -> Partition:
        if len(stand_ins) != 1 or stand_ins[0].dim() != 1:
            raise _misread(f"expected one flat tensor per param group, found {[tuple(t.shape) for t in stand_ins]}")
        flattened = self._flattened(stand_ins[0])
        trained = [p for p in members if id(p.tensor) in flattened and p.tensor.numel()]
        if not trained:
            raise _misread("a flat tensor holds no parameter of its param group")
        flat, group = stand_ins[0], internals.sharers(trained[0].tensor)
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        base = min(parameter.tensor.data_ptr() for parameter in trained)
        fragments = [
            fragment for parameter in trained for fragment in _shares(parameter, base, flat.numel(), world_size)
        ]
        by_name = {parameter.name: parameter for parameter in trained}
        for fragment in fragments:
            if fragment.rank == rank:
                parameter = by_name[fragment.parameter]
                present = parameter.tensor.view(-1).narrow(0, fragment.start, fragment.numel)
                self._prove(parameter, start=fragment.start, master=flat, offset=fragment.offset, present=present)
        return Partition(fragments, rank, world_size, group)

    def _flattened(self, flat: Tensor) -> set[int]:
        """The ids of the parameters that the present wrapper has put into a group's flat buffer.

        What it left on a parameter does not tell: an earlier engine's marks stay where a later one trains less.
        """
        parameters = internals.flattened(self._present_engine().optimizer, flat)
        if parameters is None:
            raise _misread("a flat tensor is not of the ZeRO optimizer's")
        return {id(parameter) for parameter in parameters}


class SubGroupLayout(EngineLayout):
    """Stage 3: a param group is stepped in sub-groups, each one flat fp32 tensor with a piece of every parameter in it.

    A parameter of n elements is cut into equal pieces, one per rank, the last of them padded.
    With offload to NVMe a flat tensor is empty between its steps, and can't be held against the weights.
    """

    def parts(self, index: int) -> Sequence[Tensor]:
        groups = self._sub_groups()
        return [flat for number, flat in enumerate(groups.flats) if groups.param_group[number] == index]

    def absent(self, tensor: Tensor) -> bool:
        groups = self._sub_groups()
        return tensor.numel() < groups.sizes[_number(groups, [tensor])]

    def members(self, originals: Sequence[LogicalParameter], stand_ins: Sequence[Tensor]) -> Sequence[LogicalParameter]:
        """Those of the sub-group, and with the first of a param group those that nobody trains, in no sub-group."""
        groups = self._sub_groups()
        number = _number(groups, stand_ins)
        by_tensor = {id(parameter.tensor): parameter for parameter in originals}
        tensors = groups.parameters[number]
        if any(id(tensor) not in by_tensor for tensor in tensors):
            raise _misread("a sub-group holds a parameter that is not of its param group")
        mine = [by_tensor[id(tensor)] for tensor in tensors]
        if groups.param_group[number] in [groups.param_group[other] for other in range(number)]:
            return mine
        placed = {id(tensor) for group in groups.parameters for tensor in group}
        return mine + [parameter for parameter in originals if id(parameter.tensor) not in placed]

    def partition(self, members: Sequence[LogicalParameter], stand_ins: Sequence[Tensor]) -> Partition:
        groups, flat = self._sub_groups(), stand_ins[0]
        number = _number(groups, stand_ins)
        mine = {id(tensor) for tensor in groups.parameters[number]}
        group = groups.process_group(number)
        rank, world_size = dist.get_rank(group), dist.get_world_size(group)
        fragments: list[Fragment] = []
        offset = 0
        for parameter in [member for member in members if id(member.tensor) in mine]:
            size = internals.piece_numel(parameter.tensor)
            numel = math.prod(parameter.shape)
            for owner in range(world_size):
                length = min(size, numel - owner * size)
                if length > 0:
                    fragments.append(Fragment(parameter.name, owner * size, length, owner, 0, offset))
                if length > 0 and owner == rank and not self.absent(flat):
                    piece = internals.piece(parameter.tensor).narrow(0, 0, length)
                    self._prove(parameter, start=owner * size, master=flat, offset=offset, present=piece)
            offset += size
        if offset > groups.sizes[number]:
            raise _misread(f"a sub-group of {groups.sizes[number]} elements should hold {offset}")
        return Partition(fragments, rank, world_size, group)

    def _sub_groups(self) -> internals.SubGroups:
        return internals.SubGroups.of(self._present_engine().optimizer)


def _number(groups: internals.SubGroups, stand_ins: Sequence[Tensor]) -> int:
    """Which sub-group's flat tensor stands in."""
    found = [number for number, flat in enumerate(groups.flats) if flat is stand_ins[0]]
    if len(stand_ins) != 1 or len(found) != 1:
        raise _misread("expected the flat tensor of one sub-group at a time")
    return found[0]


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


def _difference(name: str, found: Tensor, present: Tensor) -> str:
    """How far master weights are from the weights that the model uses, and what may have brought that about."""
    apart = found.to(present).ne(present)
    largest = float((found.to(torch.float32) - present.to(found.device, torch.float32)).abs().max())
    return (
        f"the fp32 master weights found for '{name}' are not that parameter's: {int(apart.sum())} of {apart.numel()} "
        f"elements that this rank holds differ, by up to {largest:.3g}. Where they nearly agree, something changed "
        "weights or masters before Shampoo first saw them (safe_set_full_fp32_param, load_state_dict on the module): "
        "do that before deepspeed.initialize, or after it returned"
    )


def _misread(reason: str) -> RuntimeError:
    return RuntimeError(f"Shampoo can't read this DeepSpeed's layout of the optimizer's parameters: {reason}")
