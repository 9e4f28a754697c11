"""Shampoo as a torch optimizer: checks its settings, keeps one ShardedGroup per param group, saves and restores."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.algorithm.precision import MatmulPrecision
from ds_shampoo.config import (
    Dtype,
    Grafting,
    GroupSettings,
    ShampooConfig,
    check_delay,
    parse,
    parse_group,
)
from ds_shampoo.parameters.reading import Parameters
from ds_shampoo.parameters.unbound import Unbound, waits_to_be_bound
from ds_shampoo.report.announcement import Announcement
from ds_shampoo.report.metrics import collect
from ds_shampoo.sharding.layout import Layout, WholeLayout
from ds_shampoo.state import resuming
from ds_shampoo.state.anew import read_anew
from ds_shampoo.state.group_records import GroupRecords
from ds_shampoo.state.shown import ShownBlocks, with_blocks
from ds_shampoo.step.elementwise import new_state
from ds_shampoo.step.rounds import Rounds
from ds_shampoo.step.sharded_group import ShardedGroup
from ds_shampoo.step.subgroups import BoundSubgroup, Subgroup, Subgroups
from ds_shampoo.step.transaction import Transaction

logger = logging.getLogger("ds_shampoo")

NamedParameters = Iterable[tuple[str, Tensor]]

# Those that are there and that no framework has laid out.
unbound: Unbound[Shampoo] = Unbound()


class Shampoo(Optimizer):
    """Distributed Shampoo (Anil et al., arXiv 2002.09018), with blocks and grafting, as docs/algorithm.md specifies it.

    Args:
        params: parameters, (name, parameter) pairs, or param-group dicts. A group may set every key from `lr` to
            `max_root_failures` for itself, and `"preconditioned": False` to take the grafting step only.
        lr: learning rate; with the default grafting it means what it means to Adam.
        betas: decay of the gradient's average and of the grafting method's second moment.
        eps: added to the root of the second moment.
        weight_decay, decoupled_weight_decay: AdamW's decay; L2 where the latter is False.
        momentum: "before": the gradient's average is preconditioned; "after": the directions are averaged.
        nesterov: look one step ahead in that average.
        grafting: whose step length each block takes: none, sgd, adagrad, rmsprop, adam, or one of the last four
            with "_normalized".
        preconditioner: "shampoo", or "spectral": spectral descent in the coordinates that the statistics give.
        direction_rms: every preconditioned block's direction gets this root mean square per element; None for the
            norm of its grafting step.
        block_size: dimensions are cut at multiples of this.
        max_preconditioner_dim: a larger dimension is left unpreconditioned; None for no limit.
        max_factor_ratio: a block's longest side is cut shorter where its factor would have more than so many times the
            block's elements, as in skinny matrices; None for no limit.
        merge_small_dims: fold small adjacent dimensions of tensors with three or more.
        embedding: what embeddings and output heads get: "diagonal" (grafting only), "one_sided" or "blocked".
        matrix_epsilon: ridge of the inverse roots, relative to the largest eigenvalue.
        inverse_exponent_override: the root's order p, up to 64; None for twice the number of factors, for "spectral"
            four times.
        start_preconditioning_step: the first preconditioned step, counted from 1.
        statistics_beta: decay of the Kronecker factors; 1 sums them as AdaGrad does.
        statistics_interval, root_interval: steps between updates of factors and of roots.
        matmul_precision: "highest", "high" or "medium": how far the inputs of the step's products, statistics and
            directions, may be rounded; what `torch.set_float32_matmul_precision` says elsewhere does not hold here.
        root_method: "eigh" or "newton" (coupled, fp64).
        root_dtype: "float32" or "bfloat16", in which roots are kept between steps.
        root_refresh_threshold: skip a root whose statistic moved less than this; 0 never skips.
        max_root_failures: boundaries without a new root after which a block takes its grafting step.
        roles: by pattern of parameters' names, as `fnmatch` takes it: "weight", "embedding", "head", "lora" (its rank's
            side only) or "none" (grafting only), where names and modules tell it wrongly. The first pattern that
            matches holds; None for no pattern.
        batch_dims: by such patterns, how many leading dimensions number independent matrices, as a layer's experts; 0
            for one tensor. None for what names and modules tell.
        fused: by such patterns, the matrices that one holds side by side, as queries, keys and values: how many of one
            size, or the length of each along rows or columns; 1 for one matrix. None for what names and modules tell.
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
        preconditioner: str = "shampoo",
        direction_rms: float | None = None,
        block_size: int = 1024,
        max_preconditioner_dim: int | None = None,
        max_factor_ratio: float | None = 16.0,
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
        roles: dict[str, Literal["weight", "embedding", "head", "lora", "none"]] | None = None,
        batch_dims: dict[str, int] | None = None,
        fused: dict[str, int | list[int]] | None = None,
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
        parameters = Parameters(model, layout or WholeLayout(), config)
        subgroups = Subgroups(config, parameters.layout, parameters.model_order)
        self._use(parameters, subgroups, GroupRecords(config, subgroups), alone=layout is None)
        defaults = {key: getattr(config, key) for key in GroupSettings.model_fields}
        super().__init__(params, defaults)
        if layout is None:
            unbound.add(self)
        if layout is None and waits_to_be_bound():
            return
        device = self._take_up()
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
        self._use(parameters, subgroups, records, alone=False)
        self.state.clear()
        unbound.discard(self)
        self._take_up()

    def _use(self, parameters: Parameters, subgroups: Subgroups, records: GroupRecords, alone: bool) -> None:
        """Begins with what was read of the parameters; `alone` where no framework lays them out."""
        self.layout, self._parameters = parameters.layout, parameters
        self._subgroups, self._records = subgroups, records
        self._announcement = Announcement(subgroups, parameters, alone)
        self._transaction = Transaction()
        self._shown = ShownBlocks()
        self._rounds = Rounds(subgroups)
        # Whether the state that was loaded last was saved by Shampoo.
        self.took_up_shampoo = False

    def _take_up(self) -> torch.device:
        """What is done once the first param groups are there; returns the device that their blocks are on."""
        self._parameters.check_patterns(self._subgroups.logical)
        self._subgroups.give_turns()
        members = [parameter for group in self._subgroups.logical for parameter in group]
        first = max(members, key=lambda parameter: parameter.tensor.requires_grad, default=None)
        device = self.layout.device(first.tensor) if first is not None else torch.device("cpu")
        if device.type != "meta":
            self._subgroups.workplace(device)
        return device

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of parameters or (name, parameter) pairs, with settings of its own.

        Raises:
            SettingsError: for a setting that is refused, a sparse or complex parameter, or a name used twice.
        """
        settings = parse_group(param_group, self.defaults)
        check_delay(settings, self._config.root_delay)
        params = param_group["params"]
        members = [params] if isinstance(params, Tensor) else list(params)
        logical = self._parameters.group(members, param_group, self._subgroups.logical)
        own = {**param_group, **settings.model_dump(), "group_index": len(self._subgroups.logical)}
        super().add_param_group({**own, "params": [parameter.tensor for parameter in logical]})
        self._records.add(own)
        self._subgroups.add(logical, settings)
        self._given_names.update({id(member[1]): member[0] for member in members if isinstance(member, tuple)})

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # threads and schedules, which it would trace anew each step
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Takes one step with the gradients that the parameters have; those without are left alone.

        What it raises while it waits leaves everything as if it had not been called, and it may be called again. A
        signal that arrives while it changes weights and state is handled when it is done.

        Raises:
            ValueError: if a closure is given.
            SettingsError: for a setting of a param group that was changed to a value that is refused, or that
                decides what blocks there are.
            WorkerError: naming the block, where its root can't be computed.
            BrokenStepError: if an earlier step failed half-way and no state was loaded since.
        """
        if closure is not None:
            raise ValueError("Shampoo.step takes no closure: compute the loss and its gradients before the step")
        if not self.layout.in_training():
            return
        self._transaction.check()
        goes_on = self.layout.keeps_blocks_apart and self._rounds.under_way  # elsewhere one call steps everything
        subgroups = self._prepared(goes_on)
        with self._transaction.running():
            for number, subgroup in enumerate(subgroups):
                self._rounds.begin(subgroup.sharded, first=number == 0 and not goes_on)
                subgroup.sharded.step(
                    subgroup.stand_ins, subgroup.states, subgroup.settings, begin=self._transaction.begin
                )
                self._shown.note(subgroup)
                self._rounds.end(subgroup.sharded)
            self._transaction.end()

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

    def state_dict(self) -> dict[str, Any]:
        """torch's `state` and `param_groups`, with this rank's factors and roots under each parameter's "blocks".

        That is a dict by the block's number in the parameter, of tensors, numbers and dicts of these: `torch.load`
        takes it with `weights_only=True`, and `torch.distributed.checkpoint` as it is. As in every torch optimizer the
        tensors are those in use. Under DeepSpeed there are no blocks in it: `engine.save_checkpoint` writes them to
        files of their own.

        Raises:
            BrokenStepError: if a step failed half-way.
        """
        self._transaction.check()
        if not self.layout.keeps_blocks_apart:
            self._all_bound()
        handle = self.register_state_dict_post_hook(self._completed, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave, bit for bit, on the rank and world size that saved it.

        As with every torch optimizer the saved settings come back too; those that differ from the present ones
        are logged. Under DeepSpeed the JSON's hold, but for the learning rate and what else was changed since the
        param group was made (by a scheduler, say), and another optimizer's moments are taken up too.

        Raises:
            SettingsError: if the state is not Shampoo's, has other param groups, the blocks were cut with other
                settings, or factors are missing; nothing is touched then.
        """
        loaded: dict[str, Any] = {}

        def last(_: Optimizer, hooked: dict[str, Any]) -> dict[str, Any]:  # what others' hooks made of it
            loaded.update(self._adapted(hooked))
            self._transaction.begin()
            return {
                **loaded,
                "state": {number: resuming.without_blocks(state) for number, state in loaded["state"].items()},
            }

        handles = [
            self.register_load_state_dict_pre_hook(last),
            self.register_load_state_dict_post_hook(lambda _: self._restore(loaded), prepend=True),
        ]
        try:
            with self._transaction.running():
                super().load_state_dict(dict(state_dict))
                self._transaction.end()
        finally:
            for handle in handles:
                handle.remove()
        self._transaction.mend()

    def __getstate__(self) -> dict[str, Any]:
        """Refuses to be copied or pickled: threads, device streams and jobs under way can't be.

        Raises:
            TypeError: saying what to do instead.
        """
        raise TypeError(
            "a Shampoo optimizer can't be copied or pickled: make a new one, and give it this one's state_dict()"
        )

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

    def subgroups(self, to_load: bool = False) -> list[BoundSubgroup]:
        """All that has blocks, stepped at present or not, with its present settings and state.

        Args:
            to_load: to put a state there, after which `mend` is to be called.

        Raises:
            BrokenStepError: if a step failed half-way, and so there is nothing to save.
        """
        if not to_load:
            self._transaction.check()
        return self._all_bound()

    def mend(self) -> None:
        """For whoever has loaded all of the state, by other ways than `load_state_dict` too."""
        self._transaction.mend()

    def made(self) -> list[dict[str, Any]]:
        """By param group, everything but its parameters as it was when the group was made."""
        return self._records.made(self.param_groups)

    def scheduled(self) -> list[dict[str, Any]]:
        """By param group, what a checkpoint brings back: its learning rate, and what was changed since it was made."""
        made = self.made()
        return [resuming.scheduled(group, own) for group, own in zip(self.param_groups, made, strict=True)]

    def sliced_parameters(self) -> set[str]:
        """The names of those of which tensor-parallel ranks hold a slice each."""
        return {p.name for group in self._subgroups.logical for p in group if p.sections is not None}

    @property
    def _groups(self) -> dict[int, ShardedGroup]:
        return dict(enumerate(self._subgroups.groups))

    def _all_bound(self) -> list[BoundSubgroup]:
        self._parameters.check_patterns(self._subgroups.logical)
        stand_ins = self._subgroups.stand_ins(self.param_groups)
        return [subgroup for group, tensors in stand_ins for subgroup in self._bound(group, tensors)]

    def _bound(self, group: Mapping[str, Any], stand_ins: Sequence[Tensor]) -> Iterator[BoundSubgroup]:
        """A group's subgroups, or those of the part of it that `stand_ins` stands for; what is missing is built."""
        settings = self._records.settings(group)
        for subgroup in self._subgroups.of(group["group_index"], stand_ins, settings):
            own = subgroup.of(stand_ins)
            yield BoundSubgroup(subgroup, settings, own, self._states_of(subgroup, own, settings))

    def _prepared(self, goes_on: bool) -> list[BoundSubgroup]:
        """What this call of `step` steps, after all waiting.

        Where a framework calls once for each param group, the first call waits for all of them: one that failed in
        the middle would leave some of them a step ahead.

        Args:
            goes_on: whether other param groups have taken this step already.
        """
        try:
            if self.layout.keeps_blocks_apart and not goes_on:
                for each in self._subgroups.all:
                    settings = self._records.last(each.index)
                    if settings is not None:
                        each.sharded.wait_for_roots(settings)
            self._parameters.check_patterns(self._subgroups.logical)
            taking_part = [group for group in self.param_groups if self._subgroups.takes_part(group)]
            bound = [subgroup for group in taking_part for subgroup in self._bound(group, group["params"])]
            self._announcement.make(self.param_groups)
            for subgroup in bound:
                subgroup.sharded.prepare(subgroup.stand_ins, subgroup.states, subgroup.settings)
        except BaseException as error:
            if goes_on:
                self._transaction.fail(error)
            raise
        return bound

    def _states_of(
        self, subgroup: Subgroup, stand_ins: Sequence[Tensor], settings: GroupSettings
    ) -> list[dict[str, Any]]:
        """The elementwise state of a subgroup's tensors, made where it is missing; without it blocks begin anew."""
        if not self.layout.keeps_blocks_apart:
            states = [self._state_of(param) for param in stand_ins]
            for name, param, state in zip(subgroup.names, stand_ins, states, strict=True):
                self._shown.follow(subgroup.sharded, name, param, state, settings=settings)
            return states
        lost = subgroup.sharded.last_step > 0 and any(
            not self.state.get(p) and not self.layout.absent(p) for p in stand_ins
        )
        if lost:
            logger.warning("the state of a param group is gone: its blocks begin anew, without statistics and roots")
            subgroup.sharded.restart(subgroup.sharded.table.blocked.keys())
        return [self._state_of(param) for param in stand_ins]

    def _completed(self, _: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state with what torch does not know of, before others' hooks see it."""
        if self.layout.keeps_blocks_apart:
            made = self.made()
            groups = [
                {**saved, resuming.CHANGED: sorted(resuming.changed(group, own))}
                for saved, group, own in zip(state_dict["param_groups"], self.param_groups, made, strict=True)
            ]
            return {**state_dict, "param_groups": groups, "blocks": {}}
        return with_blocks(state_dict, self.param_groups, self._all_bound())

    def _adapted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state as it is to be loaded, held against this optimizer.

        Raises:
            SettingsError: if it does not fit.
        """
        resuming.check_groups(state_dict, self.param_groups)
        if not self.layout.keeps_blocks_apart:
            return resuming.adapted(state_dict, self.param_groups, self._subgroups.logical)
        groups = resuming.with_present_settings(state_dict, self.param_groups, self.made())
        return {**state_dict, "param_groups": groups}

    def _restore(self, loaded: Mapping[str, Any]) -> None:
        """What torch's loading leaves to do, before others' hooks see the result."""
        resuming.restore_exactly(self.state, loaded, self.param_groups)
        self._records.forget()
        if not self.layout.keeps_blocks_apart:
            self._rounds.forget()
            self._shown.clear()
            self._subgroups.forget(resuming.parameters_with_blocks(loaded, self._subgroups.logical))
        for subgroup in self._all_bound():
            subgroup.sharded.last_step = max((int(s["step"]) for s in subgroup.states if "step" in s), default=0)

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        if not state and not self.layout.absent(param):
            state.update(new_state(param))
        return state
