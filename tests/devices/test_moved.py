"""Models that are moved after their optimizer was made: blocks follow them, and a group keeps to one device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ds_shampoo import SettingsError, Shampoo
from ds_shampoo.sharding.layout import WholeLayout
from tests.devices.simulated import DEVICE, Simulation, simulated_device
from tests.devices.test_order import Job, plain, races

CPU = torch.device("cpu")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulation]:
    with simulated_device(monkeypatch) as simulation:
        yield simulation


class Moving(WholeLayout):
    """Parameters on the host whose computation is moved."""

    def __init__(self) -> None:
        self.present = CPU

    def device(self, parameter: Tensor) -> torch.device:
        return self.present


@pytest.mark.parametrize("steps", [0, 5, 6])
def test_blocks_follow_to_the_device_and_back(device: Simulation, steps: int) -> None:
    """With all of their history, and jobs under way."""
    layout = Moving()
    job, own = Job(device, CPU, layout=layout), plain()
    for place in (DEVICE, CPU):
        job.steps(steps)
        layout.present = place
        job.steps(4)
        assert {group.device for group in job.optimizer._groups.values()} == {place}
        assert all(
            tensor.device == place
            for group in job.optimizer._groups.values()
            for stack in group.stacks
            for tensor in (*stack.factors, *stack.roots)
        )
    own.steps(2 * steps + 8)
    assert races(device) == []
    assert job.optimizer.metrics()["root_updates"] == own.optimizer.metrics()["root_updates"]
    for values, expected in zip(job.values(), own.values(), strict=True):
        assert torch.allclose(values, expected, rtol=1e-3, atol=1e-5)


def test_a_group_on_several_devices_is_refused_by_name(device: Simulation) -> None:
    here = torch.ones(4, 4, dtype=torch.float32, device=CPU, requires_grad=True)
    there = torch.ones(4, 4, dtype=torch.float32, device=DEVICE).requires_grad_(True)
    with pytest.raises(
        SettingsError, match=r"several devices \('here' on cpu, 'there' on privateuseone:0\): make a param"
    ):
        Shampoo([("here", here), ("there", there)])
    groups = [{"params": [("here", here)]}, {"params": [("there", there)]}]
    assert {group.device.type for group in Shampoo(groups)._groups.values()} == {"cpu", "privateuseone"}
