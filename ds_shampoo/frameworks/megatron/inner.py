"""The inner optimizer of Megatron's wrappers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_shampoo.frameworks.megatron.names import ModelParameter
from ds_shampoo.optimizer import Shampoo


class InnerShampoo(Shampoo):
    """Shampoo as Megatron's wrappers take an inner optimizer: each state counts its steps as torch's Adam does.

    That is in a tensor on the host, so that no step waits for the device.
    """

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Shampoo's, but for the counts: Megatron goes on to copy a checkpoint's tensors over all that is there."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state.pop("step", None)

    def count_steps(self, steps: int) -> None:
        """Sets the step count of all parameters: Megatron's checkpoints have one for all."""
        for subgroup in self.subgroups():
            subgroup.sharded.last_step = steps
            for state in subgroup.states:
                state["step"] = torch.tensor(float(steps), dtype=torch.float32, device="cpu")

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        state = super()._state_of(param)
        if "step" in state:
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device="cpu")
        return state


def named(groups: Sequence[Mapping[str, Any]], found: Mapping[int, ModelParameter]) -> list[dict[str, Any]]:
    """Megatron's param groups with their parameters' names in the undivided model."""
    return [{**group, "params": [(found[id(p)].name, p) for p in group["params"]]} for group in groups]


def prepare(inner: Shampoo, config: Any = None) -> None:
    """What Megatron calls to have state allocated before it is loaded."""
    inner.prepare()
