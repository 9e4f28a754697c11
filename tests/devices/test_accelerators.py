"""Devices that Shampoo can't run on are refused by name when it is made."""

from __future__ import annotations

import re
import types
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_shampoo import Shampoo
from ds_shampoo.accelerators import check_parameter, module_of
from ds_shampoo.config import SettingsError


class Elsewhere(torch.Tensor):
    """A tensor that says it lies on another device."""

    place: str = "cpu"

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device(self.place)


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("mps", "torch.mps has no Stream, current_stream, stream, set_device"),
        ("xla:0", "torch has no module of this name"),
        ("hpu", "torch has no module of this name"),
        ("maia", "torch has no module of this name"),
    ],
)
def test_an_accelerator_without_streams_is_refused(place: str, why: str) -> None:
    parameter = torch.zeros(4, 4).as_subclass(Elsewhere)
    parameter.place = place
    message = f"parameter 'body.weight' is on device '{place}': {why}. Shampoo runs on cpu, cuda, and accelerators"
    with pytest.raises(SettingsError, match=re.escape(message)):
        Shampoo([("body.weight", parameter)])


def test_wherever_it_stands_among_the_parameters() -> None:
    other = torch.zeros(3).as_subclass(Elsewhere)
    other.place = "mps"
    optimizer = Shampoo([("first", nn.Parameter(torch.zeros(4, 4)))])
    with pytest.raises(SettingsError, match="parameter 'second' is on device 'mps'"):
        optimizer.add_param_group({"params": [("second", other)]})


def test_a_layout_that_computes_on_such_a_device_is_refused() -> None:
    """Shards may lie on the CPU, and blocks where the model is."""
    with pytest.raises(SettingsError, match="device 'mps'"):
        module_of(torch.device("mps"))


@pytest.mark.parametrize("place", ["cuda", "cuda:1", "xpu"])
def test_those_with_streams_are_let_through(place: str) -> None:
    assert module_of(torch.device(place)) is torch.get_device_module(place)
    assert module_of(torch.device("cpu")) is None


def test_an_accelerator_from_outside_torch_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as Ascend's npu, which registers itself."""
    names: Any = ("Stream", "Event", "current_stream", "stream", "set_device")
    module = types.SimpleNamespace(**dict.fromkeys(names))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)  # which remembers what it once gave
    assert module_of(torch.device("privateuseone", 0)) is module
    del module.Event
    with pytest.raises(SettingsError, match=r"torch\.privateuseone has no Event"):
        module_of(torch.device("privateuseone", 0))


def test_parameters_on_meta_are_refused_by_the_first_step() -> None:
    """Until then they may get values: `to_empty` keeps the parameters where torch can swap their tensors."""
    model = nn.Linear(3, 4, device="meta")
    optimizer = Shampoo(model.named_parameters())
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    with pytest.raises(SettingsError, match="parameters on the meta device have no values: give the model its weights"):
        optimizer.step()


def test_parameters_on_meta_that_got_values_are_stepped() -> None:
    model = nn.Linear(3, 4, device="meta")
    optimizer = Shampoo(model.named_parameters(), root_overlap=False)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.to_empty(device="cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for param in model.parameters():
        nn.init.ones_(param)
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.metrics()["preconditioned_blocks"] == 1
    assert not torch.equal(model.weight, torch.ones(4, 3))


def test_fake_parameters_are_refused() -> None:
    with FakeTensorMode():
        fake = nn.Linear(3, 4)
    with pytest.raises(SettingsError, match=r"parameter 'weight' is a fake tensor without values.*FakeTensorMode"):
        Shampoo(fake.named_parameters())


def test_a_usual_parameter_passes() -> None:
    check_parameter("weight", nn.Parameter(torch.zeros(2, 2)))
