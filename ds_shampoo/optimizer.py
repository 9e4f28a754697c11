"""Shampoo as a torch optimizer: its settings, its step, and what it says of itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.algorithm.precision import MatmulPrecision
from ds_shampoo.algorithm.preconditioners.defaults import LEFT_OPEN, USUAL
from ds_shampoo.algorithm.selection import Role
from ds_shampoo.config import (
    Dtype,
    Grafting,
    GroupSettings,
    ShampooConfig,
    check_delay,
    parse,
    parse_group,
)
from ds_shampoo.parameters.data_parallel import layout_for
from ds_shampoo.parameters.members import listed
from ds_shampoo.parameters.reading import Parameters
from ds_shampoo.parameters.unbound import Unbound, waits_to_be_bound
from ds_shampoo.report.announcement import Announcement
from ds_shampoo.report.metrics import collect
from ds_shampoo.sharding.layout import Layout
from ds_shampoo.state.anew import read_anew
from ds_shampoo.state.group_records import GroupRecords
from ds_shampoo.state.stateful import StatefulOptimizer
from ds_shampoo.step.sharded_group import ShardedGroup
from ds_shampoo.step.subgroups import Subgroups

NamedParameters = Iterable[tuple[str, Tensor]]

# Those that are there and that no framework has laid out.
unbound: Unbound[Shampoo] = Unbound()


class Shampoo(StatefulOptimizer):
    """Distributed Shampoo (Anil et al., arXiv 2002.09018), with blocks and grafting, as docs/algorithm.md specifies it.

    Args:
        params: parameters, (name, parameter) pairs, or param-group dicts. A group may set every key from `lr` to
            `max_root_failures` for itself, and `"preconditioned": False` to take the grafting step only.
        lr: learning rate; with the default grafting it means what it means to Adam.
        betas: decay of the gradient's average and of the grafting method's second moment; this and four other keys
            are the preconditioner's own where they are None in the param group and here.
        eps: added to the root of the second moment.
        weight_decay, decoupled_weight_decay: AdamW's decay; L2 where the latter is False.
        embedding_lr_scale, head_lr_scale, vector_lr_scale: learning rates of embeddings, of output heads, and of all
            else that takes the grafting step alone, as multiples of `lr`; None for 1.
        embedding_betas, head_betas, vector_betas: theirs in place of `betas`; None for the same.
        embedding_eps, head_eps, vector_eps: theirs in place of `eps`.
        embedding_weight_decay, head_weight_decay, vector_weight_decay: theirs in place of `weight_decay`, in every
            param group that does not set the same key.
        momentum: "before": the gradient's average is preconditioned; "after": the directions are averaged.
        nesterov: look one step ahead in that average.
        momentum_warmup_steps, momentum_warmup_start: in so many steps the average's decay rises from that start to
            `betas[0]`, where it is below it.
        grafting: whose step length each block takes: none, sgd, adagrad, rmsprop, adam, or one of the last four
            with "_normalized".
        preconditioner: "polar", the whitened momentum with its outliers cut off; "shampoo", the paper's own; or
            "spectral": spectral descent in the coordinates that the statistics give.
        direction_rms: every preconditioned block's direction gets this root mean square per element, or with "grafting"
            the norm of its grafting step; None for the preconditioner's own.
        block_size: dimensions are cut at multiples of this.
        max_preconditioner_dim: a larger dimension is left unpreconditioned; None for no limit.
        max_factor_ratio: a block's longest side is cut shorter where its factor would have more than so many times the
            block's elements, as in skinny matrices; None for no limit.
        merge_small_dims: fold small adjacent dimensions of tensors with three or more.
        embedding: what embeddings and output heads get: "diagonal" (grafting only), "one_sided" or "blocked".
        matrix_epsilon: ridge of the inverse roots, relative to the largest eigenvalue.
        inverse_exponent_override: the root's order p, up to 64; None for twice the number of factors, for "spectral"
            four times, for "polar" 1.25 times, in halves.
        start_preconditioning_step: the first preconditioned step, counted from 1.
        statistics_of: what the Kronecker factors take in: "gradients", or "differences" of two successive ones, which
            are of their noise; None for the preconditioner's own.
        statistics_beta: decay of the Kronecker factors; 1 sums them as AdaGrad does.
        statistics_interval, root_interval: steps between updates of factors and of roots.
        matmul_precision: "highest", "high" or "medium": how far the inputs of the step's products, statistics and
            directions, may be rounded; what `torch.set_float32_matmul_precision` says elsewhere does not hold here.
        root_method: "eigh" or "newton" (coupled, fp64).
        root_dtype: "float32" or "bfloat16", in which roots are kept between steps.
        root_refresh_threshold: skip a root whose statistic moved less than this; 0 never skips.
        max_root_failures: boundaries without a new root after which a block goes on without roots (docs/algorithm.md,
            section 6).
        roles: by pattern of parameters' names, as `fnmatch` takes it: "weight", "embedding", "head", "lora" (its rank's
            side only) or "none" (grafting only), where names and modules tell it wrongly. The first pattern that
            matches holds; None for no pattern.
        batch_dims: by such patterns, how many leading dimensions number independent matrices, as a layer's experts; 0
            for one tensor. None for what names and modules tell.
        fused_parts: by such patterns, the matrices that one holds side by side, as queries, keys and values: how many
            of one size, or the length of each along rows or columns; 1 for one matrix. None for what names and modules
            tell.
        exchange_dtype: "float32" or "bfloat16", of what travels between ranks.
        root_overlap: compute roots on background host threads; False computes them within the step.
        root_delay: steps from a root's statistics to the step at which it is put in force, at most root_interval;
            None for half of that (for "spectral" 5 at most), or for 0 without root_overlap.
        root_threads: root threads of this rank; None for one per core of its own that training leaves, up to 8.
        root_cores: cores for the root threads of all ranks of a machine, a list or a string like "0-3,8"; "auto"
            for each rank's own.
        root_timeout: seconds after which a thread that is at one root is taken to hang.
        model: the module that the parameters belong to; gives them names and tells embeddings and heads. Where it is a
            DistributedDataParallel, or has one in it with all that is trained, its ranks share the blocks out: all of
            them make the optimizer, step it and load its state, at once.
        layout: how a host framework lays parameters out; None for whole parameters in one process.

    Raises:
        SettingsError: (a ValueError) naming the key, the value and what is allowed.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | NamedParameters | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] | None = None,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        embedding_lr_scale: float | None = None,
        embedding_betas: tuple[float, float] | None = None,
        embedding_eps: float | None = None,
        embedding_weight_decay: float | None = None,
        head_lr_scale: float | None = None,
        head_betas: tuple[float, float] | None = None,
        head_eps: float | None = None,
        head_weight_decay: float | None = None,
        vector_lr_scale: float | None = None,
        vector_betas: tuple[float, float] | None = None,
        vector_eps: float | None = None,
        vector_weight_decay: float | None = None,
        decoupled_weight_decay: bool = True,
        momentum: Literal["before", "after"] = "before",
        nesterov: bool = True,
        momentum_warmup_steps: int = 0,
        momentum_warmup_start: float = 0.85,
        grafting: Grafting = "adam",
        preconditioner: str = USUAL,
        direction_rms: float | Literal["grafting"] | None = None,
        block_size: int = 1024,
        max_preconditioner_dim: int | None = None,
        max_factor_ratio: float | None = 16.0,
        merge_small_dims: bool = True,
        embedding: Literal["diagonal", "one_sided", "blocked"] = "diagonal",
        matrix_epsilon: float = 1e-6,
        inverse_exponent_override: int | None = None,
        start_preconditioning_step: int = 1,
        statistics_of: Literal["gradients", "differences"] | None = None,
        statistics_beta: float | None = None,
        statistics_interval: int = 1,
        matmul_precision: MatmulPrecision | None = None,
        root_interval: int | None = None,
        root_method: Literal["eigh", "newton"] = "eigh",
        root_dtype: Dtype = "float32",
        root_refresh_threshold: float = 0.0,
        max_root_failures: int = 5,
        roles: dict[str, Literal["weight", "embedding", "head", "lora", "none"]] | None = None,
        batch_dims: dict[str, int] | None = None,
        fused_parts: dict[str, int | list[int]] | None = None,
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
        self._given_names: dict[int, str] = {}  # by the parameter's id
        if layout is None:
            params = listed(params)
        parameters = Parameters(model, layout or layout_for(model, params), config)
        subgroups = Subgroups(config, parameters.layout, parameters.model_order)
        self._use(parameters, subgroups, GroupRecords(config, subgroups))
        super().__init__(params, config.of_group().model_dump())
        if layout is None:
            unbound.add(self)
        if layout is None and waits_to_be_bound():
            return
        parameters.check_patterns(subgroups.logical)
        device = _take_up(subgroups)
        if device.type != "meta" and not self.layout.keeps_blocks_apart:
            self._all_bound()  # torch's tools look at the state before the first step

    def bind(self, model: nn.Module, layout: Layout) -> None:
        """Lays the same param groups out anew, as a framework will step them; for frameworks, before the first step.

        Groups, their settings, hooks and schedulers stay, and so do names that were passed with the parameters. All
        other names are the model's. What fails leaves everything as it was.

        Args:
            model: the module that the parameters belong to, in place of the one given at construction.
            layout: as at construction.

        Raises:
            SettingsError: if it has taken a step or up a state, if other tensors stand in a group than it was made
                with, and as at construction.
        """
        self._transaction.check()
        parameters = Parameters(model, layout, self._config)
        subgroups, records = read_anew(
            self.param_groups,
            parameters,
            config=self._config,
            before=self._subgroups,
            records=self._records,
            names=self._given_names,
        )
        _take_up(subgroups)
        self._use(parameters, subgroups, records)
        self.state.clear()
        unbound.discard(self)

    def _use(self, parameters: Parameters, subgroups: Subgroups, records: GroupRecords) -> None:
        super()._use(parameters, subgroups, records)
        self._announcement = Announcement(subgroups, parameters, records.origins)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters or (name, parameter) pairs, with settings of its own.

        Raises:
            SettingsError: for a setting that is refused, a sparse or complex parameter, or a name used twice.
        """
        left_open = {key for key in LEFT_OPEN if getattr(self._config, key) is None}
        own_keys = GroupSettings.model_fields.keys() - left_open  # torch adds others on loading
        settings = parse_group(param_group, {key: self.defaults[key] for key in own_keys})
        check_delay(settings, self._config.root_delay)
        params = param_group["params"]
        members = [params] if isinstance(params, Tensor) else list(params)
        logical = self._parameters.group(members, param_group, self._subgroups.logical)
        own = {**param_group, **settings.model_dump(), "group_index": len(self._subgroups.logical)}
        super().add_param_group({**own, "params": [parameter.tensor for parameter in logical]})
        own_settings = {key for key, value in param_group.items() if value is not None}
        self._records.add(own, by_group=LEFT_OPEN & own_settings, by_optimizer=LEFT_OPEN - left_open)
        self._subgroups.add(logical, settings)
        self._given_names.update({id(member[1]): member[0] for member in members if isinstance(member, tuple)})

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # threads and schedules, which it would trace anew each step
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Takes one step with the gradients that the parameters have; those without are left alone.

        Ranks that share blocks all call it at once.

        What it raises while it waits leaves everything as if it had not been called, and it may be called again. A
        signal that arrives while it changes weights and state is handled when it is done.

        Args:
            closure: computes the gradients anew; it is called first, and nothing is done where it fails.

        Returns:
            The loss that the closure gives; None without one.

        Raises:
            SettingsError: for a setting of a param group that was changed to a value that is refused, or that
                decides what blocks there are.
            WorkerError: naming the block, where its root can't be computed.
            BrokenStepError: if an earlier step failed half-way and no state was loaded since.
        """
        self._transaction.check()
        self.layout.check_step()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.layout.in_training():
            return loss
        goes_on = self.layout.keeps_blocks_apart and self._rounds.under_way  # elsewhere one call steps everything
        subgroups = self._prepared(goes_on)
        self._announcement.make(self.param_groups)
        self._consolidation.forget()
        with self._transaction.running():
            for number, subgroup in enumerate(subgroups):
                self._rounds.begin(subgroup.sharded, first=number == 0 and not goes_on)
                subgroup.sharded.step(
                    subgroup.stand_ins, subgroup.states, subgroup.settings, begin=self._transaction.begin
                )
                self._shown.note(subgroup)
                self._rounds.end(subgroup.sharded)
            self._transaction.end()
        return loss

    @property
    def between_steps(self) -> bool:
        """Whether everything has taken the step; ZeRO calls `step` once for each param group, or for parts of it."""
        return self._rounds.complete

    def prepare(self) -> None:
        """Builds blocks, owners and state of all groups now rather than at the first step.

        To be called while all groups are in place; it is what `describe` does first.
        """
        self._all_bound()
        self._announcement.make(self.param_groups)

    def describe(self) -> str:
        """A table of what is preconditioned, by which blocks, on which ranks, with bytes; and what is not, and why."""
        self.prepare()
        return self._announcement.text(self.param_groups)

    def metrics(self, sync: bool = False) -> dict[str, float]:
        """What happened so far, on this rank; numbers only.

        owned_blocks, preconditioned_blocks: blocks of this rank, and those of them whose roots are in force.
        root_updates, root_fallbacks, roots_skipped, roots_rejected: roots put in force since this process began,
        those of them that a fallback gave, boundaries that needed no root, and factors that got none.
        statistics_restarted: blocks whose statistics began afresh since one was not finite.
        roots_failed, root_waits, root_wait_ms: jobs that no thread could solve and that were solved in the step; how
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
        return collect(self._subgroups.groups, self._subgroups.workplaces, sync)

    @property
    def workspace_bytes(self) -> int:
        """Kept from step to step beside the state and the host's buffers; on CPUs only."""
        return self._subgroups.workspace_bytes

    @property
    def turns(self) -> Mapping[Block, int]:
        """Every block's turn in the rounds of root boundaries (`roots.schedule.turns_of`)."""
        return self._subgroups.turns

    def take_turns(self, turns: Mapping[Block, int]) -> None:
        """Gives the blocks other turns, before they step: those that several optimizers of one job share."""
        self._subgroups.turns = dict(turns)

    def roles(self) -> dict[int, Role]:
        """What every parameter is taken for, by its id."""
        return {id(parameter.tensor): parameter.role for group in self._subgroups.logical for parameter in group}

    def sliced_parameters(self) -> set[str]:
        """The names of those of which tensor-parallel ranks hold a slice each."""
        return {p.name for group in self._subgroups.logical for p in group if p.sections is not None}

    @property
    def _groups(self) -> dict[int, ShardedGroup]:
        return dict(enumerate(self._subgroups.groups))


def _take_up(subgroups: Subgroups) -> torch.device:
    """What is done once the first param groups are there; returns the device that their blocks are on."""
    subgroups.give_turns()
    members = [parameter for group in subgroups.logical for parameter in group]
    first = max(members, key=lambda parameter: parameter.tensor.requires_grad, default=None)
    device = subgroups.layout.device(first.tensor) if first is not None else torch.device("cpu")
    if device.type != "meta":
        subgroups.workplace(device)
    return device
