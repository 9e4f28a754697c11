"""A block of this rank, with what holds its state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.algorithm.preconditioners import Preconditioner
from ds_shampoo.config import GroupSettings
from ds_shampoo.roots.keeper import RootKeeper


@dataclass(frozen=True)
class OwnedBlock:
    """A block, the stack and the root keeper that it is in, and its slot there."""

    block: Block
    stack: Preconditioner
    keeper: RootKeeper
    slot: int

    def root_age(self, step: int) -> int | None:
        """Steps since the statistics that the roots in force belong to; None where there are none."""
        return self.keeper.age(self.slot, step)

    def state(self) -> dict[str, Any]:
        """Statistics, roots and jobs under way: tensors in use, numbers, and lists and dicts of these."""
        return {**self.stack.block_state(self.slot), **self.keeper.block_state(self.slot)}

    def check(self, state: Mapping[str, Any]) -> None:
        """Whether `load` would take the state.

        Raises:
            ValueError: naming the block and what is missing or does not fit.
        """
        self.stack.check_block_state(self.slot, state)
        self.keeper.check_block_state(self.slot, state)

    def load(self, state: Mapping[str, Any], settings: GroupSettings) -> None:
        """Takes back what `state` gave, bit for bit; jobs that were under way begin again, and are due when they were.

        Raises:
            ValueError: as `check` does; nothing is changed then.
        """
        self.check(state)
        self.stack.load_block_state(self.slot, state)
        self.keeper.load_block_state(self.slot, state, settings)
