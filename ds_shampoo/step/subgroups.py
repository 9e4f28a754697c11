"""Subgroups: what is stepped together, each with its blocks; who is trained is decided here, and here alone."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_shampoo.accelerators import module_of
from ds_shampoo.algorithm import multi_tensor
from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.config import OF_THE_MACHINE, GroupSettings, SettingsError, ShampooConfig
from ds_shampoo.roots.schedule import RootSchedule, turns_of
from ds_shampoo.roots.service import RootService
from ds_shampoo.sharding.layout import Layout
from ds_shampoo.sharding.ownership import fingerprint
from ds_shampoo.sharding.partition import LogicalParameter, check_agreement
from ds_shampoo.sharding.table import BlockTable, block_table, cut_all
from ds_shampoo.step.elementwise import StepMemory
from ds_shampoo.step.sharded_group import ShardedGroup
from ds_shampoo.step.stopwatch import Stopwatch


class Workplace(NamedTuple):
    """What the subgroups of one device share."""

    service: RootService
    stopwatch: Stopwatch


@dataclass(frozen=True)
class Subgroup:
    """What is stepped together, and the tensors of a param group that stand for it.

    Attributes:
        index: the param group's.
        sharded: its blocks.
        chosen: which of the tensors that stand in the group it steps; None for all of them.
        ids: of those that it was built for.
        names: of the parameters that these are; none where they stand for several each.
        count: how many tensors stood in the group then.
        anchor: the first parameter of it that is trained, which tells where its blocks belong; None where none is.
    """

    index: int
    sharded: ShardedGroup
    chosen: tuple[int, ...] | None
    ids: tuple[int, ...]
    names: tuple[str, ...]
    count: int
    anchor: LogicalParameter | None

    def of(self, stand_ins: Sequence[Tensor]) -> list[Tensor]:
        """Its own of the tensors that stand in the group now.

        Raises:
            RuntimeError: where parameters have been replaced by others.
        """
        if self.chosen is None:
            return list(stand_ins)
        own = [stand_ins[i] for i in self.chosen if i < len(stand_ins)]
        if len(stand_ins) != self.count or tuple(map(id, own)) != self.ids:
            raise RuntimeError(
                "the tensors of a param group were replaced after Shampoo had built their blocks; make a new optimizer "
                "for them, or under DeepSpeed call ds_shampoo.initialize"
            )
        return own


class BoundSubgroup(NamedTuple):
    """A subgroup with what stands for it at present.

    Attributes:
        settings: its param group's.
        stand_ins: the tensors that are stepped: whole parameters, or flat fp32 shards.
        states: their elementwise state.
    """

    subgroup: Subgroup
    settings: GroupSettings
    stand_ins: Sequence[Tensor]
    states: Sequence[dict[str, Any]]

    @property
    def sharded(self) -> ShardedGroup:
        return self.subgroup.sharded


class Subgroups:
    """Builds subgroups as they are needed, and keeps them.

    A parameter belongs to one from the first step at which it is trained (`requires_grad`), for good: frozen later, it
    is passed over like one without gradient, and what it had is kept and saved. One that is trained later than the
    rest of its group gets a subgroup of its own, so that no block ever changes its owner. Frameworks that replace
    parameters by tensors of their own decide by themselves, before the first step, what those stand for.

    Attributes:
        layout: how a host framework lays parameters out.
        logical: by param group, its parameters as the user passed them.
        turns: every block's in the rounds of root boundaries (`turns_of`).
    """

    def __init__(self, config: ShampooConfig, layout: Layout, model_order: Iterable[int]) -> None:
        """`model_order` are the ids of the model's parameters in its order; none where no model is known."""
        self.layout = layout
        self._model_order = {key: number for number, key in enumerate(model_order)}
        self.logical: list[list[LogicalParameter]] = []
        self.turns: dict[Block, int] = {}
        self._config = config
        self._trained: list[set[str]] = []
        self._schedules: list[GroupSettings] = []
        self._groups_with_turns = 0
        self._built: dict[Hashable, list[Subgroup]] = {}
        self._loads: dict[ShardedGroup, tuple[Hashable, list[float]]] = {}
        self._workplaces: dict[torch.device, Workplace] = {}
        self._memory = StepMemory()

    def add(self, parameters: list[LogicalParameter], settings: GroupSettings) -> None:
        """Takes a new param group on; what is trained of it at this moment is trained from the first step on."""
        self.logical.append(parameters)
        self._schedules.append(settings)
        self._trained.append({p.name for p in parameters if p.tensor.requires_grad})

    @property
    def groups(self) -> list[ShardedGroup]:
        """Those of all subgroups, in the order in which they were built."""
        return [subgroup.sharded for subgroup in self.all]

    @property
    def all(self) -> list[Subgroup]:
        return [subgroup for subgroups in self._built.values() for subgroup in subgroups]

    @property
    def workplaces(self) -> list[Workplace]:
        return list(self._workplaces.values())

    def workplace(self, device: torch.device) -> Workplace:
        """That of a device, made at its first use.

        Raises:
            SettingsError: for a device without streams, or `root_cores` that this process may not use.
        """
        if device not in self._workplaces:
            module_of(device)  # refuses one without streams
            self._workplaces[device] = Workplace(RootService(self._config, device), Stopwatch(device))
        return self._workplaces[device]

    @property
    def workspace_bytes(self) -> int:
        """Kept from step to step beside the state and the host's buffers; on CPUs only."""
        return self._memory.bytes + sum(group.workspace_bytes for group in self.groups)

    def takes_part(self, group: Mapping[str, Any]) -> bool:
        """Whether anything of a group is stepped: frameworks take the tensors out of those whose turn it isn't."""
        index, stand_ins = group["group_index"], group["params"]
        if not stand_ins and not self.layout.steps_empty:
            return False
        return bool(self._trained[index] or self._newly_trained(index, stand_ins))

    def expected(self) -> int:
        """How many subgroups make one step of everything."""
        return sum(self._expected(index) for index in range(len(self.logical)))

    def _expected(self, index: int) -> int:
        parts = self.parts(index)
        if parts is not None:
            return len(parts)
        return max(1, len(self._built.get((index, 0), ()))) if self._trained[index] else 0

    def parts(self, index: int) -> Sequence[Tensor] | None:
        """The layout's parts of a group, which DeepSpeed numbers without those that have no parameters."""
        if not self.logical[index]:
            return None
        return self.layout.parts(sum(map(bool, self.logical[:index])))

    def stand_ins(self, groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Sequence[Tensor]]]:
        """What stands for every group, or for its parts, outside of a step."""
        for group in groups:
            parts = self.parts(group["group_index"])
            if parts is None and self.takes_part(group):
                yield group, group["params"]
            for part in parts or ():
                yield group, [part]

    def of(self, index: int, stand_ins: Sequence[Tensor], settings: GroupSettings) -> list[Subgroup]:
        """The subgroups of a group, or of the part of it that `stand_ins` stands for; what is missing is built."""
        in_parts = self.parts(index) is not None
        key = index, id(stand_ins[0]) if in_parts else 0
        late = self._newly_trained(index, stand_ins)
        if key not in self._built:
            self._trained[index] |= late
            self._built[key] = [self._build(index, stand_ins, settings, None)]
        elif late:
            subgroup = self._build(index, stand_ins, settings, late)
            self._trained[index] |= late
            self._built[key] = [*self._built[key], subgroup]
        else:
            self._built[key] = [self._in_place(subgroup, settings) for subgroup in self._built[key]]
        return self._built[key]

    def forget(self, trained: Sequence[Collection[str]]) -> None:
        """Drops all subgroups, for other settings; what was trained stays so.

        Args:
            trained: by param group, what is to have blocks though it may be frozen now.
        """
        for group in self.groups:
            group.let_go()
        self._built.clear()
        self._loads.clear()
        for own, found in zip(self._trained, trained, strict=True):
            own.update(found)

    def _newly_trained(self, index: int, stand_ins: Sequence[Tensor]) -> set[str]:
        """Those that have begun to be trained since, where the tensors that stand in the group are themselves."""
        trained = self._trained[index]
        waiting = [p for p in self.logical[index] if p.name not in trained]
        own = {id(tensor) for tensor in stand_ins} if waiting else set()
        return {p.name for p in waiting if id(p.tensor) in own and self._is_trained(p.tensor)}

    def _is_trained(self, tensor: Tensor) -> bool:
        return tensor.requires_grad or (tensor.grad is not None and not self.layout.keeps_blocks_apart)

    def _build(
        self, index: int, stand_ins: Sequence[Tensor], settings: GroupSettings, late: set[str] | None
    ) -> Subgroup:
        """A subgroup of all that is trained, or of what has come late."""
        self.give_turns()
        wanted = self._trained[index] if late is None else late
        whole = {id(p.tensor): p for p in self.logical[index]}
        chosen, number = None, len(stand_ins)
        if stand_ins and all(id(tensor) in whole for tensor in stand_ins):
            chosen = tuple(i for i, tensor in enumerate(stand_ins) if whole[id(tensor)].name in wanted)
            stand_ins = [stand_ins[i] for i in chosen]
        members = [p for p in self.layout.members(self.logical[index], stand_ins) if late is None or p.name in late]
        trained = [p for p in members if p.name in wanted]
        device = self._device(trained or members)
        partition = self.layout.partition(trained, stand_ins)
        before = self._carried(id(partition.process_group), partition.world_size)
        loads = list(before)
        table = block_table(members, partition, settings, loads)
        check_agreement(table.fingerprint, "blocks and owners", partition, device)
        kernels = fingerprint([type(multi_tensor.kernels_for(device)).__name__])
        check_agreement(kernels, "using NVIDIA's apex, where each rounds otherwise", partition, device)
        sharded = self._sharded(table, settings, device)
        own = [after - load for after, load in zip(loads, before, strict=True)]
        self._loads[sharded] = id(partition.process_group), own
        names = () if chosen is None else tuple(whole[id(tensor)].name for tensor in stand_ins)
        return Subgroup(index, sharded, chosen, tuple(map(id, stand_ins)), names, number, next(iter(trained), None))

    def _sharded(self, table: BlockTable, settings: GroupSettings, device: torch.device) -> ShardedGroup:
        service, stopwatch = self.workplace(device)
        return ShardedGroup(
            table,
            settings,
            device,
            exchange_dtype=self._config.exchange_dtype,
            service=service,
            stopwatch=stopwatch,
            memory=self._memory,
            turns=self.turns,
        )

    def _carried(self, process_group: Hashable, world_size: int) -> list[float]:
        """What each rank of a process group carries already."""
        loads = [0.0] * world_size
        for key, own in self._loads.values():
            if key == process_group:
                loads = [load + more for load, more in zip(loads, own, strict=True)]
        return loads

    def _device(self, members: Sequence[LogicalParameter]) -> torch.device:
        """Where the blocks of these parameters are kept.

        Raises:
            SettingsError: where they lie on several devices.
        """
        devices = {self.layout.device(parameter.tensor): parameter.name for parameter in members}
        if len(devices) > 1:
            found = ", ".join(f"'{name}' on {device}" for device, name in devices.items())
            raise SettingsError(
                f"the parameters of a param group lie on several devices ({found}): make a param group for each device"
            )
        return next(iter(devices), torch.device("cpu"))

    def _in_place(self, subgroup: Subgroup, settings: GroupSettings) -> Subgroup:
        """The subgroup, its blocks moved to where the parameters are, should the model have been moved since."""
        if subgroup.anchor is None or self.layout.device(subgroup.anchor.tensor) == subgroup.sharded.device:
            return subgroup
        table = subgroup.sharded.table
        trained = {fragment.parameter for fragment in table.partition.fragments}
        device = self._device([p for p in self.logical[subgroup.index] if p.name in trained])
        moved = self._sharded(table, settings, device)
        moved.take_over(subgroup.sharded, settings)
        self._loads[moved] = self._loads.pop(subgroup.sharded)
        return replace(subgroup, sharded=moved)

    def give_turns(self) -> None:
        """Gives the blocks of new param groups their turns: in the model's order, whatever group they are in.

        Groups of different schedules have rounds of their own.
        """
        if self._groups_with_turns == len(self.logical):
            return
        self.layout.check_alike(self._has_to_be_alike(self._groups_with_turns))
        members: dict[RootSchedule, list[tuple[int, list[Block]]]] = {}
        for index in range(self._groups_with_turns, len(self.logical)):
            settings = self._schedules[index]
            members.setdefault(RootSchedule.of(settings), []).extend(
                (self._model_order.get(id(parameter.tensor), len(self._model_order)), cut_all([parameter], settings))
                for parameter in self.logical[index]
            )
        mine: dict[Hashable, list[Block]] = {
            schedule: [block for _, blocks in sorted(parameters, key=lambda found: found[0]) for block in blocks]
            for schedule, parameters in members.items()
        }
        for blocks in self.layout.everyones(mine).values():
            self.turns.update(zip(blocks, turns_of(blocks, len(self.turns)), strict=True))
        self._groups_with_turns = len(self.logical)

    def _has_to_be_alike(self, first: int) -> dict[str, object]:
        """What ranks have to agree on that share blocks: settings, and the param groups from the `first` on."""
        own = {*GroupSettings.model_fields, *OF_THE_MACHINE}
        said: dict[str, object] = {
            f"Shampoo setting '{key}'": value for key, value in self._config.model_dump(exclude=own).items()
        }
        for index in range(first, len(self.logical)):
            said |= {
                f"'{key}' of param group {index}": value for key, value in self._schedules[index].model_dump().items()
            }
            said |= {
                f"parameter '{p.name}'": f"{tuple(p.shape)} {p.tensor.dtype} in param group {index}"
                + (", preconditioned: false" if p.excluded else "")
                + ("" if p.tensor.requires_grad else ", not trained")
                for p in self.logical[index]
            }
        return said
