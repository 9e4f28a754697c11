"""A block's state is taken up as it was given, and every one that could fail half-way is refused before."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ds_shampoo import Shampoo
from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.state.block import misfit
from ds_shampoo.state.saving import blocks_state


@pytest.fixture(scope="module")
def saved() -> tuple[Block, dict[str, Any]]:
    """A block of 6 x 4 with roots in force and others under way."""
    weight = torch.nn.Parameter(torch.ones(6, 4))
    settings = {"root_interval": 4, "root_delay": 2, "root_refresh_threshold": 0.01, "statistics_of": "differences"}
    optimizer = Shampoo([weight], lr=0.1, **settings)
    for step in range(9):
        weight.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        optimizer.step()
    (subgroup,) = optimizer.subgroups()
    block = subgroup.sharded.owned_blocks[0].block
    return block, blocks_state([subgroup.sharded])[str(block)]


def test_what_was_given_fits(saved: tuple[Block, dict[str, Any]]) -> None:
    block, state = saved
    assert "pending" in state
    assert misfit(state, block) == ""
    assert misfit({key: value for key, value in state.items() if key != "pending"}, block) == ""
    assert misfit({**state, "rooted": []}, block) == ""
    assert misfit({**state, "order": 2.5}, block) == ""
    assert misfit({key: value for key, value in state.items() if key != "previous"}, block) == ""
    assert misfit({**state, "of another release": 1}, block) == ""


INTEGERS = torch.zeros(1, dtype=torch.int64)
OTHERS = [None, -1, 2.3, "x", [], {}, [None], torch.zeros(()), [torch.zeros(3)], [INTEGERS, INTEGERS]]


def places(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


def test_every_key_that_is_missing_or_of_another_kind_is_named(saved: tuple[Block, dict[str, Any]]) -> None:
    block, state = saved
    for path in places(state):
        changed = copy.deepcopy(state)
        parent = changed["pending"] if len(path) > 1 else changed
        for other in OTHERS:
            if path == ("rooted",) and isinstance(other, list) and len(other) < 2 and other != [None]:
                continue  # not all roots yet, which are made anew
            if path in (("pending",), ("order",)) and other is None:
                continue  # none under way
            if path == ("previous",) and other == []:
                continue  # statistics were of gradients
            if path[-1] in ("corrections", "rooted_traces") and other is OTHERS[-1]:
                continue  # tensors of one number are numbers
            parent[path[-1]] = other
            assert misfit(changed, block), (path, other)
        if path not in (("pending",), ("order",), ("previous",)):
            del parent[path[-1]]
            assert misfit(changed, block), path


@pytest.mark.parametrize("key", ["factors", "roots", "rooted", "solved", "previous"])
def test_one_too_many_or_too_few(saved: tuple[Block, dict[str, Any]], key: str) -> None:
    block, state = saved
    assert misfit({**state, key: [*state[key], state[key][0]]}, block)
    if key not in ("rooted", "previous"):
        assert misfit({**state, key: state[key][1:]}, block)
