"""Settings at the ends of what there is: refused, or a step gives finite numbers."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ds_shampoo import SettingsError, Shampoo, ShampooConfig
from ds_shampoo.auxiliary import AUXILIARY_ROLES, ROLE_SYNONYMS
from ds_shampoo.config import GROUP_TAGS, SYNONYMS, GroupSettings, parse

TINY, HUGE = 5e-324, 1.7e308
NUMBERS = [0, 1, 2, 63, 64, 65, 100, 1023, 10**6, 2**31 - 1, 2**31, 2**63, 2**64, 10**30, 10**400, -1]
NUMBERS += [TINY, 1e-46, 1e-45, 1e-38, 1e-30, 1e-16, 1e-10, 1e-6, 0.1, 0.5, 1 - 1e-16, 1.4, 1.5, 1e3, 1e6, 1e10]  # type: ignore[list-item]
NUMBERS += [1e30, 3.4e38, 3.5e38, HUGE, -TINY, -0.0]  # type: ignore[list-item]
OTHERS: list[Any] = [None, True, False, "", "1", "auto", [], [1], [0.9, 0.99], [0.9], {}, {"lr": 1}, math.nan, math.inf]
OTHERS += [[x, y] for x in (0, TINY, 1 - 1e-16, 1) for y in (0, TINY, 1 - 1e-16, 1)]
CHOICES = [
    "none",
    "sgd",
    "adagrad",
    "rmsprop",
    "adam",
    "adam_normalized",
    "shampoo",
    "spectral",
    "polar",
    "newton",
    "eigh",
]
CHOICES += ["grafting", "before", "after", "bfloat16", "float32", "medium", "blocked", "one_sided"]

# A model's threads and caches are no matter of a setting's value.
KEYS = sorted(set(ShampooConfig.model_fields) - {"root_cores"})


def steps(chosen: dict[str, Any]) -> list[torch.Tensor]:
    """Some steps on a matrix, a vector and a matrix that has zero gradients for a while; with the state they leave."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in [(5, 4), (3,), (4, 2)]]
    optimizer = Shampoo(params, **{"root_interval": 2, "root_overlap": False, **chosen})
    for step in range(5):
        for param in params:
            param.grad = torch.randn(param.shape)
        if step < 3:
            params[2].grad = torch.zeros(4, 2)
        optimizer.step()
    states = [value for param in params for value in optimizer.state[param].values() if isinstance(value, torch.Tensor)]
    return [param.detach() for param in params] + states


def is_finite_or_refused(chosen: dict[str, Any]) -> None:
    try:
        left = steps(chosen)
    except SettingsError as refused:
        message = str(refused)
        if not any(key in message for key in [*chosen, "root_interval"]):
            raise AssertionError(f"no key is named: {message}") from refused
        return
    assert all(bool(tensor.isfinite().all()) for tensor in left)


@pytest.mark.parametrize("key", KEYS)
def test_each_key_at_its_ends(key: str) -> None:
    for value in [*NUMBERS, *OTHERS, *CHOICES]:
        if key != "root_threads" or not isinstance(value, int) or value < 3:
            is_finite_or_refused({key: value})


def accepted(key: str) -> list[Any]:
    """What `key` may be by itself, of all values here."""
    found = []
    for value in [*NUMBERS, *OTHERS, *CHOICES]:
        with contextlib.suppress(SettingsError):
            parse({"root_overlap": False, key: value})
            found.append(value)
    return found


EXTREMES = {key: found for key in KEYS if key != "root_threads" and (found := accepted(key))}


@st.composite
def combinations(draw: st.DrawFn) -> dict[str, Any]:
    """A few keys at values that each may have alone, and often a learning rate and a grafting method that show all."""
    keys = draw(st.lists(st.sampled_from(sorted(EXTREMES)), unique=True, max_size=6))
    shown = draw(st.sampled_from([{}, {"lr": 1e6}, {"grafting": "none"}, {"lr": 1e6, "grafting": "sgd"}]))
    return {**{key: draw(st.sampled_from(EXTREMES[key])) for key in keys}, **shown}


@settings(max_examples=300, deadline=None)
@given(combinations())
def test_keys_together(chosen: dict[str, Any]) -> None:
    is_finite_or_refused(chosen)


def test_a_decay_past_zero_is_refused() -> None:
    for decoupled in (True, False):
        with pytest.raises(
            SettingsError, match=r"'weight_decay' = 20.0 with 'lr' = 0.1: their product must be below 2"
        ):
            Shampoo([nn.Parameter(torch.ones(2, 2))], lr=0.1, weight_decay=20.0, decoupled_weight_decay=decoupled)


@pytest.mark.parametrize("value", [65, 10**30, 1e30])
def test_the_order_of_a_root_is_bounded(value: float) -> None:
    with pytest.raises(SettingsError, match="'inverse_exponent_override' = "):
        Shampoo([nn.Parameter(torch.ones(2, 2))], inverse_exponent_override=value)  # type: ignore[arg-type]


@pytest.mark.parametrize(("key", "meant"), [*SYNONYMS.items(), ("LR", "lr"), ("Weight-Decay", "weight_decay")])
def test_other_names_of_a_key(key: str, meant: str) -> None:
    """Refused with the right name, in a group and in the JSON."""
    with pytest.raises(SettingsError, match=f"'{key}' = 1: unknown key; did you mean '{meant}'"):
        Shampoo([{"params": [nn.Parameter(torch.ones(2, 2))], key: 1}])
    hint = f"did you mean '{meant}'" if meant in ShampooConfig.model_fields else "unknown key"
    with pytest.raises(SettingsError, match=hint):
        Shampoo([nn.Parameter(torch.ones(2, 2))], **{key: 1})  # type: ignore[arg-type]


def refusal(**own: Any) -> str:
    with pytest.raises(SettingsError) as refused:
        Shampoo([{"params": [nn.Parameter(torch.ones(2, 2))], **own}])
    return str(refused.value)


def test_other_names_of_a_roles_key() -> None:
    """Also where they end as what a framework scales by itself."""
    others = ROLE_SYNONYMS.keys() - GroupSettings.model_fields.keys()
    assert {"embed_lr_scale", "head_lr_mult", "lm_head_lr_mult", "wd_norm", "bias_lr", "unembed_lr_ratio"} <= others
    for key in others:
        assert f"'{key}' = 1: unknown key; did you mean '{ROLE_SYNONYMS[key]}'" in refusal(**{key: 1})


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("embeding_lr_scale", "embedding_lr_scale"),
        ("Embedding-LR-Scale", "embedding_lr_scale"),
        ("embedding_lr_sclae", "embedding_lr_scale"),
        ("vectr_lr_scale", "vector_lr_scale"),
        ("had_lr_scale", "head_lr_scale"),
        ("head_lr_scal", "head_lr_scale"),
        ("vector_weight_decays", "vector_weight_decay"),
    ],
)
def test_misspelt_keys_of_a_role(key: str, meant: str) -> None:
    assert f"did you mean '{meant}'" in refusal(**{key: 1.0})
    with pytest.raises(SettingsError, match=f"did you mean '{meant}'"):
        parse({key: 1.0})


@pytest.mark.parametrize("role", AUXILIARY_ROLES)
def test_a_roles_rate_and_decay_past_their_bounds_are_refused(role: str) -> None:
    below = "their product must be below 2"
    own = f"'{role}_weight_decay' = 5.0 with 'lr' = 0.1 and '{role}_lr_scale' = 4.0: {below}"
    assert own in refusal(lr=0.1, **{f"{role}_lr_scale": 4.0, f"{role}_weight_decay": 5.0})
    assert f"'weight_decay' = 5.0 with 'lr' = 0.1 and '{role}_lr_scale' = 4.0: {below}" in refusal(
        lr=0.1, weight_decay=5.0, **{"embedding_lr_scale": 1.0, f"{role}_lr_scale": 4.0}
    )
    assert f"'lr' = 1000.0 and '{role}_lr_scale' = 2000.0: their product must be at most 1e+06" in refusal(
        lr=1e3, **{f"{role}_lr_scale": 2e3}
    )
    assert f"'{role}_betas[1]' = 1.0" in refusal(**{f"{role}_betas": (0.9, 1.0)})


def test_a_schedule_past_a_roles_bounds_is_refused_at_that_step() -> None:
    bias = nn.Parameter(torch.ones(3))
    optimizer = Shampoo([bias], lr=0.1, vector_lr_scale=4.0, vector_weight_decay=2.0)
    bias.grad = torch.ones(3)
    optimizer.step()
    before = bias.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.3
    with pytest.raises(SettingsError, match=r"'lr' = 0.3 and 'vector_lr_scale' = 4.0: their product must be below 2"):
        optimizer.step()
    assert torch.equal(bias, before)
    optimizer.param_groups[0].update({"lr": 0.1, "vector_lr_scale": 0.0})
    optimizer.step()
    assert torch.equal(bias, before)


FOREIGN = [
    "wd_mult", "lr_mult", "pre_wd_mult", "is_expert_parallel", "is_decoupled_lr", "max_lr", "min_lr", "base_lr",
    "default_config", "lr_scale", "base_momentum", "max_momentum", "use_muon", "amsgrad", "foreach", "maximize",
    "capturable", "differentiable", "fused", "correct_bias", "initial_lr", "weight_decay_mult", "layer_decay", "moe",
    "name", "swanlab", "betas_mult",
]  # fmt: skip


@pytest.mark.parametrize("key", FOREIGN)
def test_tags_of_frameworks_stay(key: str) -> None:
    optimizer = Shampoo([{"params": [nn.Parameter(torch.ones(2, 2))], key: 1}])
    assert optimizer.param_groups[0][key] == 1


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10),
        lambda optimizer: torch.optim.lr_scheduler.CyclicLR(optimizer, base_lr=0.01, max_lr=0.1),
    ],
    ids=["OneCycleLR", "CyclicLR"],
)
def test_groups_that_a_schedule_has_marked_are_taken(schedule: Any) -> None:
    params = [nn.Parameter(torch.ones(2, 2))]
    optimizer = Shampoo(params)
    schedule(optimizer)
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "group_index"}
    again = Shampoo([group])
    assert GROUP_TAGS & again.param_groups[0].keys()
