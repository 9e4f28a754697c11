"""Which devices Shampoo runs on: CPUs, and accelerators whose torch module has streams and events."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ds_shampoo.config import SettingsError

# What copies beside the training stream, and the times in `metrics`, are made of.
_NEEDED = ("Stream", "Event", "current_stream", "stream", "set_device")
_SUPPORTED = f"Shampoo runs on cpu, cuda, and accelerators whose torch module has {', '.join(_NEEDED)} (xpu, npu)"


def module_of(device: torch.device) -> Any:
    """The torch module that drives an accelerator; None for a CPU, which needs none.

    Raises:
        SettingsError: for a device without streams and events: mps, xla, meta.
    """
    if device.type == "cpu":
        return None
    if device.type == "meta":
        raise SettingsError(
            "parameters on the meta device have no values: give the model its weights (Module.to_empty and "
            "initialisation, or loading) before the first step"
        )
    try:
        module = torch.get_device_module(device)
    except RuntimeError:
        raise SettingsError(f"device '{device}': torch has no module of this name. {_SUPPORTED}") from None
    missing = [name for name in _NEEDED if not hasattr(module, name)]
    if missing:
        raise SettingsError(f"device '{device}': torch.{device.type} has no {', '.join(missing)}. {_SUPPORTED}")
    return module


def check_parameter(name: str, parameter: Tensor) -> None:
    """Refuses a parameter that can't be stepped where it is.

    One on the meta device may get its values, on another, until the first step.

    Raises:
        SettingsError: for one on a device that is not supported, or a fake tensor.
    """
    if not has_values(parameter):
        raise SettingsError(
            f"parameter '{name}' is a fake tensor without values, from which no inverse root can be computed: make the "
            "optimizer outside FakeTensorMode"
        )
    try:
        if parameter.device.type != "meta":
            module_of(parameter.device)
    except SettingsError as error:
        raise SettingsError(f"parameter '{name}' is on {error}") from None


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor is of real memory; those of FakeTensorMode are shapes only."""
    return not is_fake(tensor)
