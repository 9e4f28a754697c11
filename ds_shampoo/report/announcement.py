"""What a job says of itself at start, once all of it is built: the table, and what deserves a warning."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ds_shampoo.algorithm import multi_tensor, products
from ds_shampoo.parameters import wrappers
from ds_shampoo.report.table import concerns, render
from ds_shampoo.step.units import Units

logger = logging.getLogger("ds_shampoo")


class Announcement:
    """Says it when it is complete, and again when units have come later."""

    def __init__(self, units: Units, by_name_only: bool) -> None:
        """`by_name_only`: no model was given, so that embeddings and heads were known by their names alone."""
        self._units, self._by_name_only = units, by_name_only
        self._announced = 0
        self._said: set[str] = set()

    def text(self, groups: Sequence[Mapping[str, Any]]) -> str:
        """The table of all units, and who does the work; `groups` are all param groups."""
        devices = {sharded.device for sharded in self._units.groups}
        devices |= {param.device for _, held in self._units.held(groups) for param in held}
        tables = render([sharded.table for sharded in self._units.groups])
        services = "\n".join(workplace.service.describe() for workplace in self._units.workplaces)
        first = next(iter(self._units.workplaces)).service.device
        return "\n".join([f"{tables}{services}", products.describe(first), multi_tensor.describe(devices)])

    def make(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Logs it if it is whole and not logged yet, on the first rank of those that share it."""
        built = self._units.groups
        if len(built) < self._units.expected() or len(built) == self._announced:
            return
        self._announced = len(built)
        if any(sharded.table.partition.rank for sharded in built):
            return
        tables = [sharded.table for sharded in built]
        logger.info("\n%s", self.text(groups))
        wrappers.say_what_is_left_out(tables, self._units.places, self._said)
        for concern in concerns(tables, self._by_name_only):
            if concern not in self._said:
                self._said.add(concern)
                logger.warning("%s", concern)
        for workplace in self._units.workplaces:
            workplace.service.warn_of_crowding()
