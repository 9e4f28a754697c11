"""What was gathered for a state dict keeps nothing alive that is of no more use."""

from __future__ import annotations

import gc
import weakref

import torch

from ds_shampoo import Shampoo


def test_blocks_of_before_a_load_are_gone() -> None:
    weight = torch.nn.Parameter(torch.ones(6, 4))
    optimizer = Shampoo([weight], lr=0.1, root_overlap=False)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.consolidate_state_dict()
    before = weakref.ref(optimizer.subgroups()[0].sharded)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    gc.collect()
    assert before() is None
