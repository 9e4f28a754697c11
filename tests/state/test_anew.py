"""Param groups that are there already, read anew: what stays, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ds_shampoo import SettingsError, Shampoo
from ds_shampoo.sharding.layout import WholeLayout


def model_of() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))


def groups_of(model: nn.Sequential) -> list[dict[str, Any]]:
    return [{"params": []}, {"params": model[0].parameters(), "block_size": 4}, {"params": model[1].named_parameters()}]


def train(model: nn.Module, optimizer: Shampoo, steps: int = 4) -> torch.Tensor:
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full((2, 6), 1.0 + step)).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def names(optimizer: Shampoo) -> list[str]:
    return [name for subgroup in optimizer.subgroups() for name in subgroup.sharded.table.blocked]


def test_groups_names_and_schedulers_stay() -> None:
    model, other = model_of(), model_of()
    bound = Shampoo(groups_of(model), root_interval=2)
    scheduler = LambdaLR(bound, lambda step: 0.5)
    groups, dicts = bound.param_groups, list(bound.param_groups)
    bound.bind(model, WholeLayout())
    assert bound.param_groups is groups
    assert all(now is before for now, before in zip(groups, dicts, strict=True))
    assert scheduler.get_last_lr() == [group["lr"] for group in groups] == [0.0005] * 3
    assert not bound.state
    assert names(bound) == ["0.weight", "0.bias", "weight", "bias"], "the model's names, but for those that were passed"
    plain = Shampoo(groups_of(other), model=other, root_interval=2, lr=0.0005)
    assert torch.equal(train(model, bound), train(other, plain))


def test_groups_that_a_framework_took_out() -> None:
    model, other = model_of(), model_of()
    found = Shampoo(groups_of(model), root_interval=2)
    found.bind(model, WholeLayout())
    del found.param_groups[0]  # DeepSpeed does so with empty ones
    found.bind(model, WholeLayout())
    assert torch.equal(train(model, found), train(other, Shampoo(groups_of(other), model=other, root_interval=2)))


def test_settings_changed_before_hold() -> None:
    model, other = model_of(), model_of()
    found = Shampoo(model.parameters(), root_interval=2)
    found.param_groups[0].update(block_size=3, betas=(0.5, 0.5))
    found.bind(model, WholeLayout())
    plain = Shampoo(other.parameters(), model=other, root_interval=2, block_size=3, betas=(0.5, 0.5))
    assert torch.equal(train(model, found), train(other, plain))
    assert found.made()[0]["block_size"] == 1024, "as they were made"


@pytest.mark.parametrize("kind", ["stepped", "other tensors", "group gone", "pattern", "name twice"])
def test_what_is_refused_leaves_all_as_it_was(kind: str) -> None:
    model = model_of()
    found = Shampoo(groups_of(model), root_interval=2)
    if kind == "stepped":
        train(model, found, 1)
    elif kind == "other tensors":
        found.param_groups[1]["params"] = [p.detach().clone().requires_grad_() for p in model[0].parameters()]
    elif kind == "group gone":
        del found.param_groups[2]
    elif kind == "pattern":
        found = Shampoo(model.parameters(), roles={"param_1": "none"})
    elif kind == "name twice":  # one that was passed is another's in the model
        found = Shampoo([("0.bias", model[0].weight), model[0].bias])
    before = {**vars(found), "state": dict(found.state)}
    with pytest.raises(SettingsError):
        found.bind(model, WholeLayout())
    assert {**vars(found), "state": dict(found.state)} == before
