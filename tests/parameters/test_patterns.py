"""Roles and batch dimensions by patterns of names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from ds_shampoo import Shampoo
from ds_shampoo.algorithm.blocks import Section
from ds_shampoo.config import SettingsError
from ds_shampoo.sharding.layout import WholeLayout


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


def test_the_rank_of_stacked_factors() -> None:
    found = nn.ParameterDict({"stacked": torch.zeros(4, 256, 8)})
    settings = {"roles": {"stacked": "lora"}, "batch_dims": {"stacked": 1}}
    (bound,) = Shampoo(found.named_parameters(), **settings).subgroups()
    assert {owned.block.factor_dims for owned in bound.sharded.owned_blocks} == {(8,)}


def test_fused_parts() -> None:
    assert "2 of 3 x 6" in line("first.weight", fused_parts={"first.weight": 2})
    assert "6 x 6 (2 parts)" in line("first.weight", fused_parts={"first.weight": 2})
    as_weight = {"roles": {"lm_*": "weight"}}
    assert "1 of 4 x 6, 1 of 5 x 6" in line("lm_head.weight", fused_parts={"lm_head.weight": [4, 5]}, **as_weight)
    assert "1 of 9 x 2, 1 of 9 x 4" in line("lm_head.weight", fused_parts={"lm_head.weight": [2, 4]}, **as_weight)
    assert "6 of 5 x 2" in line("kernels.0", fused_parts={"kernels.*": [2, 2]}, batch_dims={"kernels.*": 1})
    assert "1 of 6 x 6" in line("first.weight", fused_parts={"first.weight": 1})


def test_fused_parts_overrule_what_was_found() -> None:
    named = [("a.qkv.weight", nn.Parameter(torch.zeros(18, 6)))]
    assert "3 of 6 x 6" in Shampoo(named).describe()
    assert "1 of 18 x 6" in Shampoo(named, fused_parts={"*.qkv.weight": 1}).describe()
    assert "1 of 10 x 6, 2 of 4 x 6" in Shampoo(named, fused_parts={"*.qkv.weight": [10, 4, 4]}).describe()


def test_a_group_that_is_added_is_held_against_them_too() -> None:
    optimizer = Shampoo([("a.qkv.weight", nn.Parameter(torch.zeros(18, 6)))], fused_parts={"*.qkv.weight": 3})
    with pytest.raises(SettingsError, match=r"says 3 of 'b\.qkv\.weight' of shape \(20, 6\): its rows, 20, do not"):
        optimizer.add_param_group({"params": [("b.qkv.weight", nn.Parameter(torch.zeros(20, 6)))]})


class Sliced(WholeLayout):
    """Says as Megatron's does where a matrix is to be cut."""

    def sections(self, name: str, parameter: torch.Tensor) -> list[Section]:  # type: ignore[override]
        return [Section((at, 0), (9, 6), (at, 0)) for at in (0, 9)]


def test_a_layout_s_own_borders_stand() -> None:
    named = [("a.qkv.weight", nn.Parameter(torch.zeros(18, 6)))]
    assert "2 of 9 x 6" in Shampoo(named, layout=Sliced()).describe()
    with pytest.raises(SettingsError, match=r"has a pattern for 'a\.qkv\.weight', which is cut as Megatron"):
        Shampoo(named, layout=Sliced(), fused_parts={"*.qkv.weight": 3})


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
            r"'roles\[first\.\*\]' = 'hidden': Input should be 'weight', 'embedding', 'head', 'lora' or",
        ),
        (
            {"batch_dims": {"kernels.*": -1}},
            r"'batch_dims\[kernels\.\*\]' = -1: Input should be greater than or equal to 0",
        ),
        ({"fused_parts": {"qvk*": 3}}, r"'fused_parts' has the pattern 'qvk\*', which matches no parameter"),
        (
            {"fused_parts": {"first.weight": 4}},
            r"says 4 of 'first.weight' of shape \(6, 6\): its rows, 6, do not divide",
        ),
        (
            {"fused_parts": {"lm_head.weight": [4, 4]}},
            r"says \[4, 4\] of 'lm_head.weight' of shape \(9, 6\): they add up to 8, but it has 9 rows and 6 columns",
        ),
        ({"fused_parts": {"first.*": 2}}, r"says 2 of 'first.bias' of shape \(6,\): it is no matrix"),
        ({"fused_parts": {"kernels.0": 2}}, r"says 2 of 'kernels.0' of shape \(3, 5, 4\): it is no matrix"),
        (
            {"fused_parts": {"first.*": 0}},
            r"'fused_parts\[first\.\*\]' = 0: must be a number of equal parts, or a list",
        ),
        (
            {"fused_parts": {"first.*": [6, 0]}},
            r"'fused_parts\[first\.\*\]' = \[6, 0\]: must be a number of equal parts",
        ),
        ({"fused_parts": {"first.*": []}}, r"= \[\]: must be a number of equal parts, or a list"),
        ({"fused_parts": {"first.*": True}}, r"= True: must be a number of equal parts, or a list"),
        ({"roles": ["first"]}, r"'roles' = \['first'\]: Input should be a valid dictionary"),
    ],
)
def test_what_means_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        described(**settings)


def test_they_hold_for_the_whole_job() -> None:
    with pytest.raises(SettingsError, match="'roles' holds for the whole job"):
        Shampoo([{"params": [nn.Parameter(torch.zeros(2, 2))], "roles": {"*": "none"}}])
