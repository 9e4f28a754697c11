"""A layout by itself is one process with whole parameters."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from ds_shampoo import Shampoo
from ds_shampoo.sharding.layout import Layout, WholeLayout
from ds_shampoo.sharding.partition import LogicalParameter, Partition, whole_fragments


class Least(Layout):
    """Overrides what every layout has to, and nothing else."""

    def partition(self, members: Sequence[LogicalParameter], stand_ins: Sequence[Tensor]) -> Partition:
        return Partition(whole_fragments(members, rank=0))


def trained(layout: Layout | None) -> tuple[Tensor, str]:
    torch.manual_seed(0)
    model = nn.Linear(6, 5)
    optimizer = Shampoo(model.parameters(), model=model, layout=layout, block_size=4, root_interval=3)
    for step in range(6):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert optimizer.metrics()["preconditioned_blocks"] == 4
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]), str(optimizer.state_dict())


def test_the_defaults_are_those_of_one_process() -> None:
    weights, state = trained(Least())
    for layout in (None, WholeLayout()):
        others_weights, others_state = trained(layout)
        assert torch.equal(weights, others_weights)
        assert state == others_state


def test_how_parameters_lie_is_never_a_default() -> None:
    with pytest.raises(TypeError, match="partition"):
        Layout()  # type: ignore[abstract]
