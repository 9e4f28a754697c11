"""Roles with settings of their own: a tensor is cut only where they differ, and every element is stepped by its own."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ds_shampoo import Shampoo
from ds_shampoo.auxiliary import AUXILIARY_ROLES, SettingsRole
from ds_shampoo.config import GroupSettings, settings_by_role
from ds_shampoo.sharding.fragments import Fragment
from ds_shampoo.step import elementwise
from ds_shampoo.step.elementwise import ElementwiseStep, StepMemory, TensorStep, new_state
from ds_shampoo.step.segments import Runs, alike, runs_by_buffer

ROLES: tuple[SettingsRole, ...] = (None, *AUXILIARY_ROLES)
EVERYTHING: dict[str, Any] = {
    "embedding_lr_scale": 4.0, "embedding_betas": (0.8, 0.9), "embedding_eps": 1e-6, "embedding_weight_decay": 0.0,
    "head_lr_scale": 0.4, "head_betas": (0.7, 0.99), "head_eps": 1e-10, "head_weight_decay": 0.3,
    "vector_lr_scale": 0.5, "vector_betas": (0.9, 0.8), "vector_eps": 1e-4, "vector_weight_decay": 0.05,
}  # fmt: skip
WAYS: list[dict[str, Any]] = [
    {},
    {"momentum": "after", "nesterov": False},
    {"decoupled_weight_decay": False, "grafting": "rmsprop"},
    {"grafting": "sgd", "momentum": "after", "decoupled_weight_decay": False},
]


class Operations(TorchDispatchMode):
    """Counts what is computed; a view of a tensor is no operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function not in (torch.ops.aten.slice.Tensor, torch.ops.aten.view.default, torch.ops.aten.alias.default):
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def settings_of(**own: Any) -> GroupSettings:
    return GroupSettings(**{"lr": 0.02, "weight_decay": 0.1, **own})


def values(numel: int, seed: int) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed))


def take_steps(tensors: list[tuple[Tensor, Tensor, dict[str, Any], Runs]], settings: GroupSettings, steps: int) -> None:
    """Steps on (parameter, gradient, state, runs) each."""
    by_role, memory = settings_by_role(settings), StepMemory()
    for number in range(steps):
        memory.restart()
        work = [
            TensorStep(param, (number + 1) * grad, state, settings=settings, by_role=by_role, memory=memory, runs=runs)
            for param, grad, state, runs in tensors
        ]
        together = ElementwiseStep(work, settings, by_role)
        together.filter_and_graft()
        for tensor in work:
            tensor.count()
        together.finish()


def shard(lengths: list[int], roles: list[SettingsRole]) -> tuple[Tensor, Tensor, dict[str, Any], Runs]:
    """A flat shard of such runs."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    param, grad = values(sum(lengths), 0), values(sum(lengths), 1)
    return param, grad, new_state(param), Runs(list(zip(starts, roles, strict=True)))


# ---------------------------------------------------------------- where a tensor is cut


@given(st.lists(st.tuples(st.integers(1, 5), st.sampled_from(ROLES)), min_size=1), st.lists(st.integers(0, 2)))
def test_segments_tile_the_tensor_and_are_as_few_as_can_be(
    runs: list[tuple[int, SettingsRole]], own: list[int]
) -> None:
    chosen = dict(zip(ROLES, [*own, *ROLES], strict=False))
    starts = [sum(length for length, _ in runs[:i]) for i in range(len(runs))]
    owner = [role for length, role in runs for _ in range(length)]
    segments = Runs([(start, role) for start, (_, role) in zip(starts, runs, strict=True)]).segments(alike(chosen))
    found = [segment.role for segment in segments for _ in range(*segment.part.indices(len(owner)))]
    assert [chosen[role] for role in found] == [chosen[role] for role in owner]
    borders = sum(chosen[a] != chosen[b] for a, b in itertools.pairwise(owner))
    assert len(segments) == 1 + borders


def test_padding_goes_with_what_lies_before_it() -> None:
    fragments = [Fragment("b", 0, 4, 0, 1, 3), Fragment("a", 7, 5, 0, 1, 12), Fragment("a", 0, 7, 0, 0, 0)]
    found = runs_by_buffer(fragments, {"a": None, "b": "vector"})
    own = alike({role: role for role in ROLES})
    assert [(s.part, s.role) for s in found[1].segments(own)] == [
        (slice(0, 12), "vector"),
        (slice(12, None), None),
    ]
    assert [(s.part, s.role) for s in found[0].segments(own)] == [(slice(0, None), None)]


# ---------------------------------------------------------------- what is computed


@pytest.mark.parametrize("limits", [(1 << 20, 1 << 20), (16, 8)], ids=["together", "in chunks"])
@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_shard_of_many_roles_is_stepped_as_its_parts_are(
    monkeypatch: pytest.MonkeyPatch, way: dict[str, Any], limits: tuple[int, int]
) -> None:
    """To the bit, each part by a group of its own whose settings are the role's."""
    monkeypatch.setattr(elementwise, "_limits", lambda device: limits)
    lengths, roles = [5, 40, 3, 1, 17, 30, 2], [None, "embedding", "vector", "vector", None, "head", "vector"]
    whole = shard(lengths, roles)
    param, grad, state, _ = whole
    expected = []
    for start, length, role in zip([sum(lengths[:i]) for i in range(7)], lengths, roles, strict=True):
        own = settings_by_role(settings_of(**EVERYTHING, **way))[role]
        part = param[start : start + length].clone()
        each = new_state(part)
        take_steps([(part, grad[start : start + length], each, Runs())], settings_of(**{**way, **own._asdict()}), 4)
        expected.append((part, each["exp_avg"], each["exp_avg_sq"]))
    before = grad.clone()
    take_steps([whole], settings_of(**EVERYTHING, **way), 4)
    for found, parts in zip((param, state["exp_avg"], state["exp_avg_sq"]), zip(*expected, strict=True), strict=True):
        assert torch.equal(found, torch.cat(parts))
    assert torch.equal(grad, before)


def operations(settings: GroupSettings, layers: int) -> Counter[str]:
    tensors = [shard([6, 2] * layers, [None, "vector"] * layers)]
    take_steps(tensors, settings, 1)
    with Operations() as found:
        take_steps(tensors, settings, 1)
    return found.counts


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_settings_that_change_nothing_cost_nothing(monkeypatch: pytest.MonkeyPatch, way: dict[str, Any]) -> None:
    """No operation, and no memory: a shard of many roles is worked on whole."""
    same = settings_of(**way)
    said = {f"{role}_{key}": getattr(same, key) for role in AUXILIARY_ROLES for key in ("betas", "eps", "weight_decay")}
    monkeypatch.setattr(elementwise, "_limits", lambda device: (1 << 20, 1 << 20))
    plain = operations(same, 8)
    assert operations(settings_of(**way, **said, vector_lr_scale=1.0), 8) == plain
    assert plain == operations(same, 1)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_launches_do_not_grow_with_the_number_of_segments(monkeypatch: pytest.MonkeyPatch, way: dict[str, Any]) -> None:
    monkeypatch.setattr(elementwise, "_limits", lambda device: (1 << 20, 1 << 20))
    settings = settings_of(**EVERYTHING, **way)
    assert operations(settings, 3) == operations(settings, 60)


def test_rates_alone_leave_the_moments_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decay and the step on the parameters are one more call each; nothing else is."""
    monkeypatch.setattr(elementwise, "_limits", lambda device: (1 << 20, 1 << 20))
    more = operations(settings_of(vector_lr_scale=0.5), 60) - operations(settings_of(), 60)
    assert sum(more.values()) == 2


# ---------------------------------------------------------------- the optimizer


class Model(nn.Module):
    """One parameter of each kind, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.layer, self.lm_head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)
        self.scan = nn.Linear(6, 5, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        out = torch.tanh(self.layer(self.words(tokens)))
        return self.lm_head(out + self.scan(out).sum(-1, keepdim=True))


SETTINGS: dict[str, Any] = {
    "lr": 0.02, "weight_decay": 0.1, "block_size": 4, "root_interval": 3, "root_overlap": False,
    "roles": {"scan.weight": "none"},
}  # fmt: skip
OF_ROLE = {"words.weight": "embedding", "lm_head.weight": "head", "layer.weight": None}


def trained(groups: Any = None, **settings: Any) -> dict[str, Tensor]:
    model = Model()
    members = model.named_parameters() if groups is None else groups(model)
    optimizer = Shampoo(members, model=model, **{**SETTINGS, **settings})
    for step in range(8):
        tokens = torch.randint(9, (4, 5), generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, 1).flatten()).backward()
        optimizer.step()
    assert optimizer.metrics()["preconditioned_blocks"] > 0
    return {name: p.detach() for name, p in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("embedding", ["diagonal", "one_sided", "blocked"])
@pytest.mark.parametrize("way", [{}, {"momentum": "after"}, {"grafting": "adam_normalized"}], ids=str)
def test_roles_are_as_param_groups_of_their_own(embedding: str, way: dict[str, Any]) -> None:
    """To the bit; embeddings and heads keep their settings where they are preconditioned, and "none" is a vector."""

    def by_role(model: nn.Module) -> list[dict[str, Any]]:
        found = settings_by_role(settings_of(**EVERYTHING))
        return [
            {"params": [(name, p)], **found[OF_ROLE.get(name, "vector")]._asdict()}
            for name, p in model.named_parameters()
        ]

    own = trained(**EVERYTHING, embedding=embedding, **way)
    assert same(own, trained(by_role, embedding=embedding, **way))
    assert not same(own, trained(embedding=embedding, **way))


def test_a_group_overrides_a_role() -> None:
    def groups(model: nn.Module) -> list[dict[str, Any]]:
        words, *rest = model.named_parameters()
        return [{"params": [words], "embedding_lr_scale": 0.0, "embedding_weight_decay": 9.0}, {"params": rest}]

    found = trained(groups, embedding_lr_scale=4.0)
    assert torch.equal(found["words.weight"], Model().words.weight)
    assert not torch.equal(found["lm_head.weight"], Model().lm_head.weight)


def test_a_pattern_decides_the_rate_too() -> None:
    still = trained(roles={"scan.weight": "head", "layer.bias": "embedding"}, head_lr_scale=0.0, embedding_lr_scale=0.0)
    start = dict(Model().named_parameters())
    unmoved = {name for name, value in still.items() if torch.equal(value, start[name])}
    assert unmoved == {"scan.weight", "layer.bias", "words.weight", "lm_head.weight"}
    assert same(
        trained(roles={"*": "weight"}, head_lr_scale=0.0, embedding_lr_scale=0.0), trained(roles={"*": "weight"})
    )
