"""An optimizer whose param groups are stepped in subgroups with blocks, and whose state comes and goes with them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer

from ds_shampoo.config import GroupSettings
from ds_shampoo.parameters.reading import Parameters
from ds_shampoo.state import resuming
from ds_shampoo.state.consolidation import Consolidation
from ds_shampoo.state.group_records import GroupRecords
from ds_shampoo.state.shown import ShownBlocks
from ds_shampoo.step.elementwise import new_state
from ds_shampoo.step.rounds import Rounds
from ds_shampoo.step.subgroups import BoundSubgroup, Subgroup, Subgroups
from ds_shampoo.step.transaction import Transaction

logger = logging.getLogger("ds_shampoo")


class StatefulOptimizer(Optimizer):
    """What of an optimizer is not the step: its subgroups with their state, and its state dict.

    Attributes:
        layout: how a host framework lays the parameters out.
    """

    def _use(self, parameters: Parameters, subgroups: Subgroups, records: GroupRecords) -> None:
        """Begins with what was read of the parameters."""
        self.layout, self._parameters = parameters.layout, parameters
        self._subgroups, self._records = subgroups, records
        self._transaction = Transaction()
        self._shown, self._consolidation = ShownBlocks(), Consolidation()
        self._rounds = Rounds(subgroups)

    def consolidate_state_dict(self, to: int | None = None) -> None:
        """Gathers the blocks of all ranks for `state_dict`, where ranks share them; all of them call it at once.

        What is gathered is kept, in the host's memory, until the next step. Where nothing is shared nothing is done.

        Args:
            to: the rank that gets them, of the DistributedDataParallel's; None for all ranks.

        Raises:
            BrokenStepError: if a step failed half-way.
        """
        self._transaction.check()
        if not self.layout.keeps_blocks_apart:
            self._consolidation.gather(self._all_bound(), to)

    def state_dict(self) -> dict[str, Any]:
        """torch's `state` and `param_groups`, with factors and roots under each parameter's "blocks".

        That is a dict by the block's number in the parameter, of tensors, numbers and dicts of these: `torch.load`
        takes it with `weights_only=True`, and `torch.distributed.checkpoint` as it is. As in every torch optimizer the
        tensors are those in use. Where ranks share blocks, `consolidate_state_dict` comes first. Under DeepSpeed there
        are no blocks in it: `engine.save_checkpoint` writes them to files of their own.

        Raises:
            BrokenStepError: if a step failed half-way.
            RuntimeError: if this rank lacks blocks of others.
        """
        self._transaction.check()
        if not self.layout.keeps_blocks_apart:
            self._consolidation.check(self._all_bound())
        handle = self.register_state_dict_post_hook(self._completed, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what `state_dict` gave, bit for bit; each rank takes the blocks that it owns.

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
            self._parameters.look_again(self._subgroups.logical)
            taking_part = [group for group in self.param_groups if self._subgroups.takes_part(group)]
            bound = [subgroup for group in taking_part for subgroup in self._bound(group, group["params"])]
            self.layout.check_gradients()
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
        return self._consolidation.completed(state_dict, self.param_groups, self._all_bound())

    def _adapted(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A state as it is to be loaded, held against this optimizer.

        Raises:
            SettingsError: if it does not fit.
        """
        if not self.layout.keeps_blocks_apart:
            with self.layout.together():
                adapted = resuming.adapted(state_dict, self.param_groups, self._subgroups.logical)
            self.layout.check_alike(resuming.told(adapted))
            return adapted
        resuming.check_groups(state_dict, self.param_groups)
        groups = resuming.with_present_settings(state_dict, self.param_groups, self.made())
        return {**state_dict, "param_groups": groups}

    def _restore(self, loaded: Mapping[str, Any]) -> None:
        """What torch's loading leaves to do, before others' hooks see the result."""
        resuming.restore_exactly(self.state, loaded, self.param_groups)
        self._records.forget()
        self._consolidation.forget()
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
