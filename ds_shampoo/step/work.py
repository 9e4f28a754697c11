"""What one step of a subgroup works on: its tensors' elementwise steps, memory for the blocks, and the way between."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ds_shampoo.config import GroupSettings
from ds_shampoo.step.elementwise import ElementwiseStep, TensorStep


@dataclass(frozen=True)
class StepWork:
    """The work of one step.

    Attributes:
        settings: the param group's.
        tensors: by stand-in, its elementwise step; None for one that takes no part.
        blank: by stand-in, [numel] fp32, what others get of one that takes no part; None where nobody expects that.
        elementwise: the step of all that take part.
        workspace: two tensors [n, *shape] per stack of blocks; None where no rank has blocks.
        device: that of the blocks; the tensors may lie on the host (ZeRO-Offload).
    """

    settings: GroupSettings
    tensors: Sequence[TensorStep | None]
    blank: Sequence[Tensor | None]
    elementwise: ElementwiseStep
    workspace: tuple[list[Tensor], list[Tensor]] | None
    device: torch.device

    @property
    def gathered(self) -> list[Tensor]:
        """By stack, what came from the ranks."""
        return self._workspace[0]

    @property
    def scratch(self) -> list[Tensor]:
        """By stack, room for the products."""
        return self._workspace[1]

    @property
    def _workspace(self) -> tuple[list[Tensor], list[Tensor]]:
        assert self.workspace is not None, "only where there are blocks"
        return self.workspace

    def count(self, usual: int) -> int:
        """Counts the step in every tensor's state.

        Returns:
            The largest count; `usual` where this rank has no tensor that takes part.
        """
        present = [tensor for tensor in self.tensors if tensor is not None]
        for tensor in present:
            tensor.count()
        return max((tensor.step for tensor in present), default=usual)

    def step_counts(self) -> set[int]:
        """The different counts of the tensors that take part."""
        return {tensor.step for tensor in self.tensors if tensor is not None}

    def staged(self, name: Literal["grad", "vector", "update"], waited_for_later: bool = True) -> list[Tensor | None]:
        """A vector of every tensor, on the device of the blocks; whole, since many small copies would be slow.

        Args:
            waited_for_later: the step brings something back afterwards, for which the host waits. Otherwise it waits
                here: the device reads pinned memory, which the host may write to when the step is over.
        """
        return [
            own if tensor is None else self._stage(getattr(tensor, name), waited_for_later)
            for tensor, own in zip(self.tensors, self.blank, strict=True)
        ]

    def returned(self, staged: Sequence[Tensor | None]) -> list[Tensor]:
        """Those that there are, on the device where their tensors' elementwise step goes on."""
        return [
            vector.to(tensor.grad.device)
            for vector, tensor in zip(staged, self.tensors, strict=True)
            if vector is not None and tensor is not None
        ]

    def unstage(self, updates: Sequence[Tensor | None]) -> None:
        """Brings updates that were staged elsewhere back to where the elementwise step goes on."""
        for update, tensor in zip(updates, self.tensors, strict=True):
            if tensor is not None and update is not None and update is not tensor.update:
                tensor.update.copy_(update)

    def _stage(self, vector: Tensor, waited_for_later: bool) -> Tensor:
        if vector.device == self.device:
            return vector
        # A copy to the host is waited for: what reads it there would not.
        return vector.to(self.device, non_blocking=waited_for_later and self.device.type != "cpu")
