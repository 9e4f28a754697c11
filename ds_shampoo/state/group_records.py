"""What is remembered of every param group: as what it was made, and the settings that were found good last."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ds_shampoo.algorithm.preconditioners.defaults import LEFT_OPEN
from ds_shampoo.config import GroupSettings, ShampooConfig, check_delay, checked_settings, present_settings
from ds_shampoo.state import resuming
from ds_shampoo.step.subgroups import Subgroups


class GroupRecords:
    """Follows the param groups, which anyone may change between steps; keyed by their "group_index"."""

    def __init__(self, config: ShampooConfig, subgroups: Subgroups) -> None:
        self._config, self._subgroups = config, subgroups
        self._made: list[dict[str, Any]] = []
        self._set: list[tuple[Collection[str], Collection[str]]] = []  # by the group, by the optimizer
        self._good: dict[int, tuple[dict[str, Any], GroupSettings]] = {}

    def add(self, group: Mapping[str, Any], *, by_group: Collection[str], by_optimizer: Collection[str]) -> None:
        """Remembers a param group as it is made, and which of `LEFT_OPEN` were set for it, and for all groups."""
        self._made.append({key: value for key, value in group.items() if key != "params"})
        self._set.append((by_group, by_optimizer))

    def origins(self, group: Mapping[str, Any]) -> dict[str, str]:
        """Where a group has each setting from that its preconditioner has a default for."""
        made, (by_group, by_optimizer) = self._made[group["group_index"]], self._set[group["group_index"]]
        found = dict.fromkeys(sorted(LEFT_OPEN), "its own")
        found |= dict.fromkeys(by_optimizer, "set for all") | dict.fromkeys(by_group, "set for the group")
        return found | {key: "changed since" for key in LEFT_OPEN if not resuming.same(group[key], made[key])}

    def over(self, subgroups: Subgroups) -> GroupRecords:
        """The same param groups as they were made, over other subgroups; their settings are looked at anew."""
        found = GroupRecords(self._config, subgroups)
        found._made, found._set = list(self._made), list(self._set)
        return found

    @property
    def all_made(self) -> Sequence[Mapping[str, Any]]:
        """Everything but the parameters of all groups as they were made, those that are gone since too."""
        return self._made

    def made(self, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Everything but the parameters of these groups as they were made."""
        return [self._made[group["group_index"]] for group in groups]

    def settings(self, group: Mapping[str, Any]) -> GroupSettings:
        """A group's present settings, looked at anew whenever somebody changed them.

        Raises:
            SettingsError: for a value that is refused, or one that decides what blocks there are.
        """
        index, present = group["group_index"], present_settings(group)
        found = self._good.get(index)
        if found is None or found[0] != present:
            settings = checked_settings(present)
            check_delay(settings, self._config.root_delay)
            for subgroup in self._subgroups.all:
                if subgroup.index == index:
                    resuming.check_structure(subgroup.sharded.settings, settings)
            self._good[index] = found = present, settings
        resuming.check_preconditioned(group, self._made[index])
        return found[1]

    def last(self, index: int) -> GroupSettings | None:
        """A group's settings at its last step, also while a framework hides it; None before the first."""
        found = self._good.get(index)
        return found[1] if found is not None else None

    def forget(self) -> None:
        """The groups were loaded: all are looked at anew."""
        self._good.clear()
