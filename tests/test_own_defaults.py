"""What a preconditioner brings along, and what goes before it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from ds_shampoo import SettingsError, Shampoo
from ds_shampoo.algorithm.preconditioners import PRECONDITIONERS
from ds_shampoo.algorithm.preconditioners.defaults import DEFAULTS, LEFT_OPEN
from ds_shampoo.config import GroupSettings, parse


def weight(number: int = 0) -> nn.Parameter:
    return nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(number)))


def run(optimizer: Shampoo, param: nn.Parameter, steps: range) -> None:
    for step in steps:
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()


def test_every_preconditioner_says_all_of_it() -> None:
    assert DEFAULTS.keys() == PRECONDITIONERS.keys()
    assert all(own.keys() == LEFT_OPEN for own in DEFAULTS.values())


@pytest.mark.parametrize("name", sorted(PRECONDITIONERS))
@pytest.mark.parametrize("way", ["optimizer", "group", "both"])
def test_the_name_alone_brings_them(name: str, way: str) -> None:
    params = weight()
    group: dict[str, Any] = {"params": [params]} | ({"preconditioner": name} if way != "optimizer" else {})
    other = "spectral" if way == "both" else "shampoo"
    optimizer = Shampoo([group], preconditioner=name if way == "optimizer" else other)
    found = optimizer.param_groups[0]
    assert {key: found[key] for key in LEFT_OPEN} == dict(DEFAULTS[name])
    run(optimizer, params, range(3))
    written = weight()
    explicit = Shampoo([written], preconditioner=name, **DEFAULTS[name])
    run(explicit, written, range(3))
    assert torch.equal(params, written)


def test_polar_is_what_one_gets_and_the_paper_s_own_is_a_word_away() -> None:
    found = Shampoo([weight()]).param_groups[0]
    assert found["preconditioner"] == parse({}).preconditioner == "polar"
    assert (found["betas"], found["statistics_of"], found["root_interval"]) == ((0.9, 0.95), "differences", 3)
    found = Shampoo([weight()], preconditioner="shampoo").param_groups[0]
    assert (found["betas"], found["statistics_beta"], found["root_interval"]) == ((0.95, 0.95), 0.5, 10)
    assert (found["direction_rms"], found["matmul_precision"]) == ("grafting", "highest")


def test_the_group_goes_before_the_optimizer_and_that_before_the_preconditioner() -> None:
    groups = [
        {"params": [weight()], "preconditioner": "polar", "root_interval": 3},
        {"params": [weight()], "preconditioner": "spectral", "statistics_beta": None, "direction_rms": "grafting"},
        {"params": [weight()], "root_interval": None},
    ]
    found = Shampoo(groups, statistics_beta=0.7, root_interval=20, direction_rms=None).param_groups
    assert [group["root_interval"] for group in found] == [3, 20, 20]
    assert [group["statistics_beta"] for group in found] == [0.7] * 3
    assert [group["direction_rms"] for group in found] == [0.4, "grafting", 0.4]


def test_a_late_group_too() -> None:
    optimizer = Shampoo([weight()], preconditioner="spectral", betas=(0.9, 0.99))
    optimizer.add_param_group({"params": [weight()], "preconditioner": "shampoo"})
    found = optimizer.param_groups[1]
    assert (found["statistics_beta"], found["root_interval"], found["betas"]) == (0.5, 10, (0.9, 0.99))


def test_schedules_find_numbers() -> None:
    optimizer = Shampoo([{"params": [weight()], "betas": None}], preconditioner="polar", betas=None)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    schedule.step()
    assert 0.85 < optimizer.param_groups[0]["betas"][0] < 0.95
    assert optimizer.defaults["betas"] == (0.9, 0.95)


@pytest.mark.parametrize("value", ["graft", 0, -1, 1e7, True, float("nan"), [0.2]])
def test_a_length_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(SettingsError, match=r"'direction_rms' = .*: must be \"grafting\", or a number from 1e-10"):
        Shampoo([weight()], direction_rms=value)  # type: ignore[arg-type]


def test_the_usual_delay_under_spectral() -> None:
    def delays(**settings: Any) -> int:
        optimizer = Shampoo([weight()], **settings)
        (subgroup,) = optimizer.subgroups()
        return optimizer._subgroups.workplaces[0].service.delay(subgroup.settings)

    assert delays(preconditioner="spectral") == 5
    assert delays(preconditioner="spectral", root_interval=3) == 2
    assert delays(preconditioner="spectral", root_delay=20) == 20
    assert delays(root_interval=50) == 25
    assert (delays(preconditioner="shampoo"), delays()) == (5, 2)


def test_a_delay_is_held_against_the_preconditioners_interval() -> None:
    assert parse({"preconditioner": "spectral", "root_delay": 50}).root_delay == 50
    with pytest.raises(SettingsError, match="'root_delay' = 50: must be at most root_interval, which is 3"):
        parse({"preconditioner": "polar", "root_delay": 50})
    with pytest.raises(SettingsError, match="'root_delay' = 20: must be at most root_interval, which is 3"):
        Shampoo([{"params": [weight()], "preconditioner": "polar"}], preconditioner="spectral", root_delay=20)


def test_embeddings_of_a_group_with_a_rate_of_its_own_have_that_rate() -> None:
    """Who gave them one for AdamW is not to have it multiplied; frameworks give groups the optimizer's own rate."""
    groups = [
        {"params": [weight()], "lr": 0.01},
        {"params": [weight()], "lr": 0.03},
        {"params": [weight()]},
        {"params": [weight()], "lr": 0.03, "embedding_lr_scale": 2.0},
    ]
    found = Shampoo(groups, lr=0.01).param_groups
    assert [group["embedding_lr_scale"] for group in found] == [4.0, 1.0, 4.0, 2.0]
    groups = [{"params": [weight()], "lr": 0.03}]
    assert Shampoo(groups, lr=0.01, embedding_lr_scale=5.0).param_groups[0]["embedding_lr_scale"] == 5.0


def test_the_table_says_what_came_of_it_and_who_set_it() -> None:
    groups = [
        {"params": [("a", weight())], "root_interval": 7},
        {"params": [("b", weight())], "preconditioner": "spectral"},
        {"params": [("c", weight())], "preconditioner": "spectral"},
    ]
    optimizer = Shampoo(groups, preconditioner="polar", statistics_beta=0.9)
    optimizer.param_groups[0]["betas"] = (0.8, 0.95)
    lines = optimizer.describe().splitlines()
    assert (
        'preconditioner "polar": changed since: betas (0.8, 0.95); its own: direction_rms 0.4, embedding_lr_scale 4.0, '
        "matmul_precision medium, statistics_of differences; set for the group: root_interval 7; set for all: "
        "statistics_beta 0.9; root_delay 4 (param group 0)"
    ) in lines
    assert (
        'preconditioner "spectral": its own: betas (0.95, 0.95), direction_rms 0.2, embedding_lr_scale 1.0, '
        "matmul_precision highest, root_interval 50, statistics_of gradients; set for all: statistics_beta 0.9; "
        "root_delay 5 (param groups 1, 2)"
    ) in lines


@pytest.mark.parametrize("name", sorted(PRECONDITIONERS))
def test_a_checkpoint_holds_what_came_of_it(name: str, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"preconditioner": name, "block_size": 4, "root_overlap": False}
    params, resumed = weight(), weight()
    optimizer, other = Shampoo([params], **settings), Shampoo([resumed], **settings)
    run(optimizer, params, range(6))
    state = optimizer.state_dict()
    assert {key: state["param_groups"][0][key] for key in LEFT_OPEN} == dict(DEFAULTS[name])
    with torch.no_grad():
        resumed.copy_(params)
    with caplog.at_level(logging.WARNING, "ds_shampoo"):
        other.load_state_dict(state)
    assert "from the checkpoint" not in caplog.text
    run(optimizer, params, range(6, 10))
    run(other, resumed, range(6, 10))
    assert torch.equal(params, resumed)


def test_null_of_an_earlier_release_is_the_grafting_norm() -> None:
    settings: dict[str, Any] = {"preconditioner": "spectral", "block_size": 4}
    params, resumed = weight(), weight()
    optimizer = Shampoo([params], **settings, direction_rms="grafting")
    run(optimizer, params, range(6))
    state = optimizer.state_dict()
    state["param_groups"][0]["direction_rms"] = None
    with torch.no_grad():
        resumed.copy_(params)
    other = Shampoo([resumed], **settings)
    other.load_state_dict(state)
    assert other.param_groups[0]["direction_rms"] == "grafting"
    run(optimizer, params, range(6, 10))
    run(other, resumed, range(6, 10))
    assert torch.equal(params, resumed)


def test_settings_by_themselves_are_whole() -> None:
    assert GroupSettings(preconditioner="polar", direction_rms=None).direction_rms == 0.4
    with pytest.raises(ValueError, match="must be one of 'shampoo', 'spectral', 'polar'"):
        GroupSettings(preconditioner="polr")
