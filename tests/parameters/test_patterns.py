"""Roles and batch dimensions by patterns of names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ds_shampoo import Shampoo
from ds_shampoo.config import SettingsError


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "first": nn.Linear(6, 6),
            "lm_head": nn.Linear(6, 9),
            "conv": nn.Conv1d(6, 6, 4, groups=6),
            "kernels": nn.ParameterList([nn.Parameter(torch.zeros(3, 5, 4))]),
        }
    )


def described(**settings: Any) -> str:
    found = model()
    return Shampoo(found.parameters(), model=found, **settings).describe()


def line(name: str, **settings: Any) -> str:
    return next(line for line in described(**settings).splitlines() if f" {name} " in line)


def test_roles_overrule_what_was_found() -> None:
    assert "none: output head (embedding: diagonal)" in line("lm_head.weight")
    assert "1 of 9 x 6" in line("lm_head.weight", roles={"lm_*": "weight"})
    assert "none: depthwise convolution" in line("conv.weight")
    assert "1 of 6 x 4" in line("conv.weight", roles={"conv.*": "weight"})
    assert 'none: role "none"' in line("first.weight", roles={"first.weight": "none"})
    assert "none: embedding (embedding: diagonal)" in line("first.weight", roles={"f*": "embedding"})
    assert "1 of 6 x 6" in line("first.weight", roles={"f*": "head"}, embedding="one_sided")


def test_the_first_pattern_that_matches_holds() -> None:
    assert "1 of 9 x 6" in line("lm_head.weight", roles={"lm_head.weight": "weight", "*": "none"})
    assert 'none: role "none"' in line("lm_head.weight", roles={"*": "none", "lm_head.weight": "weight"})


def test_batch_dims() -> None:
    assert "1 of 3 x 20" in line("kernels.0")
    assert "3 of 5 x 4" in line("kernels.0", batch_dims={"kernels.*": 1})


def test_every_name_of_a_tied_parameter_counts() -> None:
    tied = model()
    tied["copy"] = nn.Linear(6, 6)  # type: ignore[operator]
    tied["copy"].weight = tied["first"].weight  # type: ignore[index]
    table = Shampoo(tied.parameters(), model=tied, roles={"copy.weight": "none"}).describe()
    assert 'none: role "none"' in next(line for line in table.splitlines() if " first.weight " in line)


def test_they_work_on_names_that_are_passed() -> None:
    named = [("a.w", nn.Parameter(torch.zeros(4, 4))), ("b.w", nn.Parameter(torch.zeros(2, 4, 4)))]
    table = Shampoo(named, roles={"a.*": "none"}, batch_dims={"b.*": 1}).describe()
    assert 'role "none"' in table
    assert "2 of 4 x 4" in table


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"roles": {"lm_haed*": "head"}}, r"'roles' has the pattern 'lm_haed\*', which matches no parameter; .* first"),
        ({"batch_dims": {"expert*": 1}}, r"'batch_dims' has the pattern 'expert\*', which matches no parameter"),
        ({"batch_dims": {"kernels.*": 2}}, r"'batch_dims' says 2 of 'kernels.0' of shape \(3, 5, 4\): at least two"),
        ({"batch_dims": {"*": 1}}, r"'batch_dims' says 1 of 'first.weight' of shape \(6, 6\)"),
        (
            {"roles": {"first.*": "hidden"}},
            r"'roles\[first\.\*\]' = 'hidden': Input should be 'weight', 'embedding', 'head' or",
        ),
        (
            {"batch_dims": {"kernels.*": -1}},
            r"'batch_dims\[kernels\.\*\]' = -1: Input should be greater than or equal to 0",
        ),
        ({"roles": ["first"]}, r"'roles' = \['first'\]: Input should be a valid dictionary"),
    ],
)
def test_what_means_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        described(**settings)


def test_they_hold_for_the_whole_job() -> None:
    with pytest.raises(SettingsError, match="'roles' holds for the whole job"):
        Shampoo([{"params": [nn.Parameter(torch.zeros(2, 2))], "roles": {"*": "none"}}])
