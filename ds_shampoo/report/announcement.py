"""What a job says of itself at start, once all of it is built: the table, and what deserves a warning."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ds_shampoo.algorithm import multi_tensor, products
from ds_shampoo.config import GroupSettings, present_settings
from ds_shampoo.kernels import boxes
from ds_shampoo.parameters import wrappers
from ds_shampoo.parameters.reading import Parameters
from ds_shampoo.report.origins import Origins, describe_settings
from ds_shampoo.report.table import concerns, render
from ds_shampoo.sharding.table import BlockTable
from ds_shampoo.step.subgroups import Subgroups

logger = logging.getLogger("ds_shampoo")


class Announcement:
    """Says it when it is complete, and again when subgroups have come later."""

    def __init__(self, subgroups: Subgroups, parameters: Parameters, origins: Origins) -> None:
        """`origins` tells where a param group has its settings from."""
        self._subgroups, self._parameters, self._origins = subgroups, parameters, origins
        self._announced = 0
        self._said: set[str] = set()

    @property
    def _tables(self) -> list[BlockTable]:
        return [sharded.table for sharded in self._subgroups.groups]

    def text(self, groups: Sequence[Mapping[str, Any]]) -> str:
        """The table of all subgroups, and who does the work; `groups` are all param groups."""
        devices = {sharded.device for sharded in self._subgroups.groups}
        devices |= {param.device for _, params in self._subgroups.stand_ins(groups) for param in params}
        present = {group["group_index"]: GroupSettings.model_construct(**present_settings(group)) for group in groups}
        tables = render(self._tables, [present[each.index] for each in self._subgroups.all])
        services = "\n".join(workplace.service.describe() for workplace in self._subgroups.workplaces)
        service = next(iter(self._subgroups.workplaces)).service
        settings = describe_settings(
            groups, self._origins, {index: service.delay(own) for index, own in present.items()}
        )
        parts = [f"{tables}{settings}", services, products.describe(service.device), multi_tensor.describe(devices)]
        parts += [boxes.describe(device) for device in devices if device.type in boxes.DEVICES]
        return "\n".join(parts)

    def make(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Logs it if it is whole and not logged yet, on the first rank of those that share it."""
        built = self._subgroups.groups
        if len(built) < self._subgroups.expected() or len(built) == self._announced:
            return
        if self._parameters.layout.alone and not self._announced:
            wrappers.warn_of_repeated_work(self._parameters.model)
        self._announced = len(built)
        if any(sharded.table.partition.rank for sharded in built):
            return
        logger.info("\n%s", self.text(groups))
        wrappers.say_what_is_left_out(self._tables, self._subgroups.turns, self._said)
        for concern in concerns(self._tables, by_name_only=not self._parameters.have_names):
            if concern not in self._said:
                self._said.add(concern)
                logger.warning("%s", concern)
        for workplace in self._subgroups.workplaces:
            workplace.service.warn_of_crowding()
