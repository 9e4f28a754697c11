"""Who is trained when: layers frozen and unfrozen in any order, under one rule, and saved meanwhile."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ds_shampoo import Shampoo

SETTINGS: dict[str, Any] = {"lr": 0.01, "block_size": 4, "root_interval": 3}
LAYERS = 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def freeze(model: Net, frozen: set[int]) -> None:
    for number, layer in enumerate(model.layers):
        layer.requires_grad_(number not in frozen)


def train(model: Net, optimizer: Shampoo, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = (model(x) - x.roll(1, dims=1)).square().mean()
        if loss.requires_grad:
            loss.backward()
        optimizer.step()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def one_group(model: Net) -> list[dict[str, Any]]:
    return [{"params": list(model.parameters())}]


def a_group_a_layer(model: Net) -> list[dict[str, Any]]:
    return [{"params": list(layer.parameters())} for layer in model.layers]


GROUPS = [one_group, a_group_a_layer]
# What is frozen in three phases of training.
PHASES = [
    [{0, 1}, {0}, set()],  # gradual unfreezing
    [{1, 2}, {0, 2}, {0, 1}],  # layers that take turns
    [set(), {0, 1}, set()],
    [{0, 1, 2}, set(), {1}],
]


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("phases", PHASES, ids=str)
def test_frozen_is_as_without_gradient(groups: Callable[[Net], Any], phases: list[set[int]]) -> None:
    """`requires_grad` changes nothing but whether there are gradients; blocks are there from the first on."""
    by_flag, by_grad = Net(), Net()
    freeze(by_flag, phases[0])
    frozen = Shampoo(groups(by_flag), **SETTINGS)
    without = Shampoo(groups(by_grad), **SETTINGS)
    for number, phase in enumerate(phases):
        freeze(by_flag, phase)
        for step in range(8 * number, 8 * number + 8):
            train(by_flag, frozen, range(step, step + 1))
            assert frozen.between_steps
            x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
            without.zero_grad()
            (by_grad(x) - x.roll(1, dims=1)).square().mean().backward()
            for layer in phase:
                by_grad.layers[layer].zero_grad()
            without.step()
    assert torch.equal(weights(by_flag), weights(by_grad))
    trained = set().union(*({*range(LAYERS)} - phase for phase in phases))
    assert frozen.metrics()["owned_blocks"] == 4 * len(trained)
    assert frozen.metrics()["preconditioned_blocks"] == without.metrics()["preconditioned_blocks"]


def test_what_is_never_trained_has_no_state() -> None:
    """As the base of an adapter, whose factors would take more memory than the model."""
    model = Net()
    freeze(model, {0, 1})
    optimizer = Shampoo(model.parameters(), **SETTINGS)
    train(model, optimizer, range(5))
    assert optimizer.metrics()["owned_blocks"] == 4
    assert len(optimizer.state) == 2
    assert optimizer.describe().count("not trained") == 4


SUBSETS = st.sets(st.integers(0, LAYERS - 1))


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(GROUPS), st.lists(SUBSETS, min_size=1, max_size=3), SUBSETS, st.integers(0, 4),
    st.lists(SUBSETS, min_size=1, max_size=2),
)  # fmt: skip
def test_saved_and_loaded_in_any_phase(
    groups: Callable[[Net], Any], before: list[set[int]], at_load: set[int], more: int, after: list[set[int]]
) -> None:
    """The run goes on to the same bits, whatever was frozen when it was saved, and when the state is loaded."""
    model = Net()
    freeze(model, before[0])
    optimizer = Shampoo(groups(model), **SETTINGS)
    step = 0
    for phase in before:
        freeze(model, phase)
        train(model, optimizer, range(step, step + 5))
        step += 5
    train(model, optimizer, range(step, step + more))
    step += more
    other = Net()
    other.load_state_dict(model.state_dict())
    freeze(other, at_load)
    resumed = Shampoo(groups(other), **SETTINGS)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for phase in after:
        for each, own in ((model, optimizer), (other, resumed)):
            freeze(each, phase)
            train(each, own, range(step, step + 5))
        step += 5
    assert torch.equal(weights(model), weights(other))
    assert optimizer.metrics()["preconditioned_blocks"] == resumed.metrics()["preconditioned_blocks"]
