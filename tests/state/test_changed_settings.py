"""Settings of a param group that somebody changes in mid-run: followed, refused, and kept by a checkpoint."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ds_shampoo import SettingsError, Shampoo
from ds_shampoo.state import resuming

SETTINGS: dict[str, Any] = {"lr": 0.01, "preconditioner": "shampoo", "block_size": 4, "root_interval": 3}


def a_step(param: nn.Parameter, optimizer: Shampoo, step: int) -> None:
    param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(step))
    optimizer.step()


@pytest.fixture
def param() -> nn.Parameter:
    return nn.Parameter(torch.randn(6, 5, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_size", 3),
        ("max_preconditioner_dim", 4),
        ("merge_small_dims", False),
        ("preconditioner", "spectral"),
        ("root_dtype", "bfloat16"),
        ("statistics_of", "differences"),
        ("embedding", "blocked"),
        ("preconditioned", False),
    ],
)
def test_what_decides_the_blocks_is_refused_by_name(param: nn.Parameter, key: str, value: Any) -> None:
    optimizer = Shampoo([param], **SETTINGS)
    a_step(param, optimizer, 0)
    before = copy.deepcopy(optimizer.state_dict())
    former = optimizer.param_groups[0].get(key, True)
    optimizer.param_groups[0][key] = value
    for use in (lambda: a_step(param, optimizer, 1), optimizer.state_dict, optimizer.subgroups):
        with pytest.raises(SettingsError, match=f"'{key}' = "):
            use()
    optimizer.param_groups[0][key] = former
    assert optimizer.state_dict()["state"][0]["step"] == before["state"][0]["step"] == 1
    a_step(param, optimizer, 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [("betas", (0.9, 1.5)), ("root_interval", 0), ("grafting", "adm"), ("weight_decay", -1.0), ("lr", "fast")],
)
def test_a_wrong_value_is_refused_before_anything_is_changed(param: nn.Parameter, key: str, value: Any) -> None:
    optimizer = Shampoo([param], **SETTINGS)
    a_step(param, optimizer, 0)
    before = param.detach().clone()
    optimizer.param_groups[0][key] = value
    with pytest.raises(SettingsError, match=f"'{key}"):
        a_step(param, optimizer, 1)
    assert torch.equal(param, before)
    assert optimizer.state[param]["step"] == 1


def test_a_list_that_is_changed_in_place_is_looked_at(param: nn.Parameter) -> None:
    optimizer = Shampoo([param], **SETTINGS)
    optimizer.param_groups[0]["betas"] = [0.9, 0.95]
    a_step(param, optimizer, 0)
    optimizer.param_groups[0]["betas"][0] = 2.0
    with pytest.raises(SettingsError, match=r"'betas\[0\]' = 2.0"):
        a_step(param, optimizer, 1)


@pytest.mark.parametrize("number", [np.float32(0.02), np.float64(0.02), torch.tensor(0.02), np.int64(1)], ids=repr)
def test_numbers_of_any_kind_are_taken(param: nn.Parameter, number: Any) -> None:
    """A trainer's schedule is often NumPy's."""
    other = nn.Parameter(param.detach().clone())
    optimizer, plain = Shampoo([param], **SETTINGS), Shampoo([other], **SETTINGS)
    optimizer.param_groups[0]["lr"], plain.param_groups[0]["lr"] = number, float(number)
    for step in range(3):
        a_step(param, optimizer, step)
        a_step(other, plain, step)
    assert torch.equal(param, other)


@pytest.mark.parametrize("momentum", [True, False])
def test_one_cycle(param: nn.Parameter, momentum: bool) -> None:
    """torch's schedulers change `betas` by default, and leave keys of their own that resemble ours."""
    optimizer = Shampoo([param], **SETTINGS)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=20, cycle_momentum=momentum)
    for step in range(5):
        a_step(param, optimizer, step)
        scheduler.step()
    assert (optimizer.param_groups[0]["betas"] != (0.95, 0.95)) == momentum
    resumed = Shampoo([copied := nn.Parameter(param.detach().clone())], **SETTINGS)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.param_groups[0]["betas"] == optimizer.param_groups[0]["betas"]
    a_step(param, optimizer, 5)
    a_step(copied, resumed, 5)
    assert torch.equal(param, copied)


def test_a_job_whose_settings_hold_says_where_the_checkpoints_differ(caplog: pytest.LogCaptureFixture) -> None:
    """As under DeepSpeed: a checkpoint of a release in which "spectral" had the grafting step's norm, say."""

    def group(*changed: str, **settings: Any) -> dict[str, Any]:
        optimizer = Shampoo([nn.Parameter(torch.zeros(6, 5))], **{**SETTINGS, "preconditioner": "spectral", **settings})
        return {**optimizer.param_groups[0], "params": [0], resuming.CHANGED: list(changed)}

    saved = {"param_groups": [group("betas", "lr", root_interval=7, betas=[0.8, 0.9], lr=0.3)]}
    saved["param_groups"][0]["direction_rms"] = None
    found = resuming.with_present_settings(saved, [group()], [group()])
    assert [found[0][key] for key in ("direction_rms", "root_interval")] == [0.2, 3]
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"'{key}' is {now} from this job's settings, not {before} as in the job that saved the checkpoint"
        for key, now, before in (("direction_rms", 0.2, "'grafting'"), ("root_interval", 3, 7))
    ]
    caplog.clear()
    resuming.with_present_settings({"param_groups": [group()]}, [group()], [group()])
    assert not caplog.records
