"""Shampoo as a torch optimizer: checks its settings, keeps one ShardedGroup per param group, saves and restores."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from ds_shampoo import saving
from ds_shampoo.algorithm import multi_tensor, products, selection
from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.algorithm.precision import MatmulPrecision
from ds_shampoo.config import (
    Dtype,
    Grafting,
    GroupSettings,
    SettingsError,
    ShampooConfig,
    check_delay,
    group_settings,
    parse,
    parse_group,
)
from ds_shampoo.elementwise import StepMemory, new_state
from ds_shampoo.group import ShardedGroup, Unit
from ds_shampoo.host.schedule import RootSchedule, stagger
from ds_shampoo.host.service import RootService
from ds_shampoo.metrics import collect
from ds_shampoo.report import render
from ds_shampoo.sharding.ownership import fingerprint
from ds_shampoo.sharding.partition import Layout, LogicalParameter, WholeLayout, check_agreement
from ds_shampoo.sharding.table import block_table, cut_all
from ds_shampoo.stopwatch import Stopwatch

logger = logging.getLogger("ds_shampoo")

NamedParameters = Iterable[tuple[str, Tensor]]


class Shampoo(Optimizer):
    """Distributed Shampoo (Anil et al., arXiv 2002.09018), with blocks and grafting, as docs/algorithm.md specifies it.

    Args:
        params: parameters, (name, parameter) pairs, or param-group dicts. A group may set every key below for
            itself, and `"preconditioned": False` to take the grafting step only.
        lr: learning rate; with the default grafting it means what it means to Adam.
        betas: decay of the gradient's average and of the grafting method's second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled (AdamW's) unless `decoupled_weight_decay` is False (L2).
        momentum: "before": the gradient's average is preconditioned; "after": the directions are averaged.
        nesterov: look one step ahead in that average.
        grafting: whose step length each block takes: none, sgd, adagrad, rmsprop, adam, or one of the last four
            with "_normalized".
        preconditioner: "shampoo", or "spectral": spectral descent in the coordinates that the statistics give.
        direction_rms: every preconditioned block's direction gets this root mean square per element; None for the
            norm of its grafting step.
        block_size: dimensions are cut at multiples of this.
        max_preconditioner_dim: a larger dimension is left unpreconditioned; None for no limit.
        merge_small_dims: fold small adjacent dimensions of tensors with three or more.
        embedding: what embeddings and output heads get: "diagonal" (grafting only), "one_sided" or "blocked".
        matrix_epsilon: ridge of the inverse roots, relative to the largest eigenvalue.
        inverse_exponent_override: the root's order p; None for twice the number of factors, for "spectral" four times.
        start_preconditioning_step: the first preconditioned step, counted from 1.
        statistics_beta: decay of the Kronecker factors; 1 sums them as AdaGrad does.
        statistics_interval, root_interval: steps between updates of factors and of roots.
        matmul_precision: "highest", "high" or "medium": how far the inputs of the step's products, statistics and
            directions, may be rounded; what `torch.set_float32_matmul_precision` says elsewhere does not hold here.
        root_method: "eigh" or "newton" (coupled, fp64).
        root_dtype: "float32" or "bfloat16", in which roots are kept between steps.
        root_refresh_threshold: skip a root whose statistic moved less than this; 0 never skips.
        max_root_failures: boundaries without a new root after which a block takes its grafting step.
        exchange_dtype: "float32" or "bfloat16", of what travels between ranks.
        root_overlap: compute roots on background host threads; False computes them within the step.
        root_delay: steps from a root's statistics to the step at which it is put in force, at most root_interval;
            None for half of that, or for 0 without root_overlap.
        root_threads: root threads of this rank; None for one per core of its own that training leaves, up to 8.
        root_cores: cores for the root threads of all ranks of a machine, a list or a string like "0-3,8"; "auto"
            for each rank's own.
        root_timeout: seconds after which a thread that is at one root is taken to hang.
        model: the module that the parameters belong to; gives them names and tells embeddings and heads.
        layout: how a host framework lays parameters out; None for whole parameters in one process.

    Raises:
        SettingsError: (a ValueError) naming the key, the value and what is allowed.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | NamedParameters | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decoupled_weight_decay: bool = True,
        momentum: Literal["before", "after"] = "before",
        nesterov: bool = True,
        grafting: Grafting = "adam",
        preconditioner: Literal["shampoo", "spectral"] = "shampoo",
        direction_rms: float | None = None,
        block_size: int = 1024,
        max_preconditioner_dim: int | None = None,
        merge_small_dims: bool = True,
        embedding: Literal["diagonal", "one_sided", "blocked"] = "diagonal",
        matrix_epsilon: float = 1e-6,
        inverse_exponent_override: int | None = None,
        start_preconditioning_step: int = 1,
        statistics_beta: float = 0.5,
        statistics_interval: int = 1,
        matmul_precision: MatmulPrecision = "highest",
        root_interval: int = 10,
        root_method: Literal["eigh", "newton"] = "eigh",
        root_dtype: Dtype = "float32",
        root_refresh_threshold: float = 0.0,
        max_root_failures: int = 5,
        exchange_dtype: Dtype = "float32",
        root_overlap: bool = True,
        root_delay: int | None = None,
        root_threads: int | None = None,
        root_cores: str | list[int] = "auto",
        root_timeout: float = 120.0,
        model: nn.Module | None = None,
        layout: Layout | None = None,
        **unknown: Any,
    ) -> None:
        settings = {key: value for key, value in locals().items() if key in ShampooConfig.model_fields}
        config = parse({**settings, **unknown})
        self._config = config
        self.layout = layout if layout is not None else WholeLayout()
        self._names = selection.names(model) if model is not None else {}
        self._roles = selection.roles(model) if model is not None else {}
        self._logical: list[list[LogicalParameter]] = []
        # Every block's in `stagger`'s order; decides when its roots are due.
        self.places: dict[Block, int] = {}
        self._placed_groups = 0
        self._groups: dict[tuple[int, int], ShardedGroup] = {}
        self._loads: dict[int, list[float]] = {}
        self._stepped: set[ShardedGroup] = set()
        # Whether the state that was loaded last was saved by Shampoo.
        self.took_up_shampoo = False
        defaults = {key: getattr(config, key) for key in GroupSettings.model_fields}
        super().__init__(params, defaults)
        first = next((parameter for group in self._logical for parameter in group), None)
        self._device = self.layout.device(first.tensor) if first is not None else torch.device("cpu")
        self._place_blocks()
        self._service = RootService(config, self._device)
        self._stopwatch = Stopwatch(self._device)
        self._memory = StepMemory()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters or (name, parameter) pairs, with settings of its own.

        Raises:
            SettingsError: for a setting that is refused, a sparse or complex parameter, or a name used twice.
        """
        settings = parse_group(param_group, self.defaults)
        check_delay(settings, self._config.root_delay)
        params = param_group["params"]
        members = [params] if isinstance(params, Tensor) else list(params)
        logical = [self._logical_parameter(member, param_group, number) for number, member in enumerate(members)]
        taken = {parameter.name for group in self._logical for parameter in group}
        for parameter in logical:
            if parameter.name in taken:
                raise SettingsError(f"parameter name '{parameter.name}' is used twice")
            taken.add(parameter.name)
        group = {
            **param_group,
            **settings.model_dump(),
            "params": [parameter.tensor for parameter in logical],
        }
        super().add_param_group({**group, "group_index": len(self._logical)})
        self._logical.append(logical)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Takes one step with the gradients that the parameters have; those without are left alone.

        Raises:
            ValueError: if a closure is given.
        """
        if closure is not None:
            raise ValueError("Shampoo.step takes no closure: compute the loss and its gradients before the step")
        if not self.layout.in_training():
            return
        for group in self.param_groups:
            if not self._takes_part(group):
                continue
            sharded = self._sharded(group, group["params"])
            if not self._stepped or sharded in self._stepped:
                self._stepped.clear()
                self._service.begin_step()
            states = [self._state_of(param) for param in group["params"]]
            sharded.step(group["params"], states, group_settings(group))
            self._stepped.add(sharded)
            if self.between_steps:
                self._stopwatch.end_step()

    @property
    def between_steps(self) -> bool:
        """Whether everything has taken the step; ZeRO calls `step` once for each param group, or for parts of it."""
        return len(self._stepped) == self._count()

    def prepare(self) -> None:
        """Builds blocks, owners and state of all groups now rather than at the first step.

        To be called while all groups are in place; it is what `describe` and `load_state_dict` do first.
        """
        for group, held in self._held():
            self._sharded(group, held)
            for param in held:
                self._state_of(param)

    def describe(self) -> str:
        """A table of what is preconditioned, by which blocks, on which ranks, with bytes; and what is not, and why."""
        self.prepare()
        return self._table()

    def metrics(self, sync: bool = False) -> dict[str, float]:
        """What happened so far, on this rank; numbers only.

        owned_blocks, preconditioned_blocks: blocks of this rank, and those of them whose roots are in force.
        root_updates, root_fallbacks, roots_skipped, roots_rejected: roots put in force since this process began,
        those of them that a fallback gave, boundaries that needed no root, and factors that got none.
        roots_failed, root_waits, root_wait_ms: jobs whose thread died or hung and that were solved in the step; how
        often a step waited for a job, and for how long in all.
        root_age_mean, root_age_max: steps since the statistics that the roots in force belong to; 0 for none.
        root_queue_depth, root_busy_ms, root_threads_busy: jobs not begun yet, for how long the threads worked, and
        the share of their time that this is.
        snapshot_bytes: host memory for statistics and roots on their way.
        exchange_bytes: sent to other ranks in the last step.
        elementwise_ms, exchange_ms, statistics_ms, roots_ms, precondition_ms: of the newest step that the device is
        through with; roots_ms is to begin jobs, wait for them and put roots in force.

        Args:
            sync: wait for the device, so that the times are those of the last step.
        """
        return collect(self._groups.values(), self._service, self._stopwatch, sync)

    def state_dict(self) -> dict[str, Any]:
        """torch's `state` and `param_groups`, and `blocks`: this rank's factors and roots by block name.

        Under DeepSpeed `blocks` is empty: `engine.save_checkpoint` writes them to files of their own. Plain tensors
        and numbers only, so that `torch.load(weights_only=True)` takes it; blocks are copies in host memory.
        """
        blocks = {} if self.layout.keeps_blocks_apart else saving.on_host(saving.blocks_state(self._groups.values()))
        return {**super().state_dict(), "blocks": blocks}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave, bit for bit, on the rank and world size that saved it.

        As with every torch optimizer the saved settings come back too; those that differ from the present ones
        are logged. Under DeepSpeed the present JSON's hold, but for the scheduler's learning rate, and another
        optimizer's moments are taken up too.

        Raises:
            SettingsError: if the blocks were cut with other settings, or factors are missing.
        """
        if self.layout.keeps_blocks_apart:
            self.took_up_shampoo = "blocks" in state_dict
            state_dict = {**state_dict, "param_groups": saving.with_present_settings(state_dict, self.param_groups)}
        else:
            saving.check_fits(state_dict, self.param_groups)
            state_dict = {**state_dict, "param_groups": saving.with_all_settings(state_dict, self.param_groups)}
            for built in (self._groups, self._loads, self._stepped):  # for settings that are not the saved ones
                built.clear()
        super().load_state_dict(dict(state_dict))
        saving.restore_exactly(self.state, state_dict, self.param_groups)
        self.prepare()
        if state_dict.get("blocks"):
            saving.load_blocks(state_dict["blocks"], self.units())

    @property
    def workspace_bytes(self) -> int:
        """Kept from step to step beside the state and the host's buffers; on CPUs only."""
        return self._memory.bytes + sum(group.workspace_bytes for group in self._groups.values())

    def units(self) -> list[Unit]:
        """Everything that is stepped together, with its present settings and state."""
        self.prepare()
        return [
            Unit(self._sharded(group, held), group_settings(group), [self._state_of(param) for param in held])
            for group, held in self._held()
        ]

    def sliced_parameters(self) -> set[str]:
        """The names of those of which tensor-parallel ranks hold a slice each."""
        return {p.name for group in self._logical for p in group if p.sections is not None}

    def _held(self) -> Iterator[tuple[dict[str, Any], Sequence[Tensor]]]:
        """What is stepped together: every param group, or its parts, with the tensors that stand for it."""
        for group in self.param_groups:
            parts = self._parts(group["group_index"])
            if parts is None and self._takes_part(group):
                yield group, group["params"]
            for part in parts or ():
                yield group, [part]

    def _takes_part(self, group: Mapping[str, Any]) -> bool:
        """Whether a group is stepped now: frameworks take the tensors out of those whose turn it isn't."""
        return (bool(group["params"]) or self.layout.steps_empty) and self._is_trained(group["group_index"])

    def _count(self) -> int:
        """How much there is of what is stepped together."""
        parts = ((index, self._parts(index)) for index in range(len(self._logical)))
        return sum(self._is_trained(index) if own is None else len(own) for index, own in parts)

    def _is_trained(self, index: int) -> bool:
        """Whether any parameter of a group is; frameworks may drop the tensors of one that is wholly frozen."""
        return any(parameter.tensor.requires_grad for parameter in self._logical[index])

    def _parts(self, index: int) -> Sequence[Tensor] | None:
        """The layout's parts of a group, which DeepSpeed numbers without those that have no parameters."""
        if not self._logical[index]:
            return None
        return self.layout.parts(sum(map(bool, self._logical[:index])))

    def _sharded(self, group: Mapping[str, Any], held: Sequence[Tensor]) -> ShardedGroup:
        index, settings = group["group_index"], group_settings(group)
        key = index, id(held[0]) if held else 0
        if key not in self._groups:
            self._place_blocks()
            members = self.layout.members(self._logical[index], held)
            partition = self.layout.partition(members, held)
            loads = self._loads.setdefault(id(partition.process_group), [0.0] * partition.world_size)
            table = block_table(members, partition, settings, loads)
            check_agreement(table.fingerprint, "blocks and owners", partition, self._device)
            kernels = fingerprint([type(multi_tensor.kernels_for(self._device)).__name__])
            check_agreement(kernels, "using NVIDIA's apex, where each rounds otherwise", partition, self._device)
            self._groups[key] = ShardedGroup(
                table,
                settings,
                self._config.exchange_dtype,
                self._device,
                self._service,
                self._stopwatch,
                self._memory,
                self.places,
            )
            self._log_table()
        return self._groups[key]

    def _place_blocks(self) -> None:
        """Gives the blocks of new param groups their places: in the model's order, whatever group they are in.

        Groups of different schedules have rounds of their own.
        """
        if self._placed_groups == len(self._logical):
            return
        order = {key: number for number, key in enumerate(self._names)}
        members: dict[RootSchedule, list[tuple[int, list[Block]]]] = {}
        for index in range(self._placed_groups, len(self._logical)):
            settings = group_settings(self.param_groups[index])
            members.setdefault(RootSchedule.of(settings), []).extend(
                (order.get(id(parameter.tensor), len(order)), cut_all([parameter], settings))
                for parameter in self._logical[index]
            )
        mine: dict[Hashable, list[Block]] = {
            schedule: [block for _, blocks in sorted(parameters, key=lambda found: found[0]) for block in blocks]
            for schedule, parameters in members.items()
        }
        for blocks in self.layout.everyones(mine).values():
            self.places.update(zip(blocks, stagger(blocks, len(self.places)), strict=True))
        self._placed_groups = len(self._logical)

    def _table(self) -> str:
        devices = {self._device, *(param.device for _, held in self._held() for param in held)}
        tables = render([group.table for group in self._groups.values()])
        work = products.describe(self._device), multi_tensor.describe(devices)
        return "\n".join([f"{tables}{self._service.describe()}", *work])

    def _log_table(self) -> None:
        """Logs the table of all groups once it is whole, on the first rank of those that share it."""
        if len(self._groups) < self._count():
            return
        if all(group.table.partition.rank == 0 for group in self._groups.values()):
            logger.info("\n%s", self._table())
            self._service.warn_of_crowding()

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        if not state and not self.layout.absent(param):
            state.update(new_state(param))
        return state

    def _logical_parameter(self, member: Any, group: Mapping[str, Any], number: int) -> LogicalParameter:
        name, tensor = member if isinstance(member, tuple) else (None, member)
        if not isinstance(tensor, Tensor):
            raise TypeError(f"Shampoo takes tensors or (name, tensor) pairs, not {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise SettingsError(f"Shampoo can't optimize a parameter of dtype {tensor.dtype}")
        position = f"param_{sum(len(logical) for logical in self._logical) + number}"
        own_name = name or self._names.get(id(tensor), position)
        name = self.layout.name(own_name, tensor)
        role = self._roles.get(id(tensor)) or selection.name_role(name, tensor)
        shape, excluded = selection.full_shape(tensor), not group.get("preconditioned", True)
        return LogicalParameter(name, tensor, shape, role, excluded, self.layout.sections(own_name, tensor))
