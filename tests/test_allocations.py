"""A step between root boundaries allocates nothing that grows with the model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.allocations import allocations_of
from ds_shampoo import Shampoo
from tests.quiet import quiet_steps

BLOCK = 128
BLOCK_BYTES = 4 * BLOCK**2


@pytest.mark.parametrize("momentum", ["before", "after"])
@pytest.mark.parametrize("copies", [1, 4])
def test_a_steady_step_allocates_less_than_three_blocks(copies: int, momentum: str) -> None:
    model = nn.Sequential(*(nn.Linear(4 * BLOCK, 2 * BLOCK) for _ in range(copies)))
    optimizer = Shampoo(
        model.parameters(), block_size=BLOCK, momentum=momentum, root_interval=100, root_delay=1, root_overlap=False,
        weight_decay=0.1,
    )  # fmt: skip
    blocks = 8 * copies
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    for _ in range(2, quiet_steps(optimizer, root_interval=100, root_delay=1, count=1)):
        optimizer.step()
    assert optimizer.metrics()["preconditioned_blocks"] == blocks
    found = allocations_of(optimizer.step)
    assert found.largest <= BLOCK_BYTES
    assert found.peak <= 3 * BLOCK_BYTES
    assert found.kept <= 0.01 * BLOCK_BYTES
