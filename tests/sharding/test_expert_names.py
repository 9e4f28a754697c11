"""Experts are told by name, however a library holds them, and come in the order of the undivided model."""

from __future__ import annotations

import pytest
from torch import nn

from ds_shampoo.sharding.expert_names import ExpertName, expert_name
from ds_shampoo.sharding.model_order import model_order

DEEPSPEED = "layers.1.mlp.deepspeed_moe.experts.deepspeed_experts.{}.up.weight"
SEQUENTIAL = "decoder.layers.1.mlp.experts.local_experts.{}.linear_fc1.weight"
GROUPED = "decoder.layers.1.mlp.experts.linear_fc1.weight{}"
GROUPED_BIAS = "decoder.layers.1.mlp.experts.linear_fc2.bias{}"
MODULES = "model.layers.1.mlp.experts.{}.up_proj.weight"
BY_NUMBER = [DEEPSPEED, SEQUENTIAL, GROUPED, GROUPED_BIAS, MODULES, "experts.{}.up.weight", "layers.1.experts.{}"]


@pytest.mark.parametrize("pattern", BY_NUMBER)
@pytest.mark.parametrize("number", [0, 3, 12])
def test_an_experts_number(pattern: str, number: int) -> None:
    before, after = pattern.split("{}")
    found = expert_name(pattern.format(number))
    assert found == ExpertName(before, number, after)
    assert str(found) == pattern.format(number)
    assert str(found.numbered_from(8)) == pattern.format(number + 8)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.1.mlp.experts.weight1",  # all experts' in one
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.mlp.weight1",
        "decoder.layers.1.mlp.linear_fc1.weight",
        "decoder.layers.1.mlp.linear_fc1.weight1",
        "layers.3.up.weight",
        "experts.3x.up.weight",
        "experts_of.3.up.weight",
    ],
)
def test_a_name_that_tells_no_expert(name: str) -> None:
    assert expert_name(name) is None


def test_the_innermost_list_of_experts_counts() -> None:
    found = expert_name("experts.1.layers.0.deepspeed_moe.experts.deepspeed_experts.2.up.weight")
    assert found is not None
    assert (found.number, found.after) == (2, ".up.weight")


def grouped(experts: int) -> nn.Module:
    """As Transformer Engine's grouped layer: one module with a weight and a bias for each."""
    layer = nn.Module()
    for number in range(experts):
        layer.register_parameter(f"weight{number}", nn.Parameter())
        layer.register_parameter(f"bias{number}", nn.Parameter())
    layer.register_parameter("weight_scale", nn.Parameter())
    return layer


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(1, 1) for _ in range(12))}), "experts.{}.weight"),
        (nn.ModuleDict({"experts": nn.ParameterList(nn.Parameter() for _ in range(12))}), "experts.{}"),
        (nn.ModuleDict({"experts": nn.ModuleDict({"linear_fc1": grouped(12)})}), "experts.linear_fc1.weight{}"),
        (nn.ModuleDict({"experts": nn.ModuleDict({"linear_fc2": grouped(12)})}), "experts.linear_fc2.bias{}"),
    ],
    ids=["modules", "parameters", "weights", "biases"],
)
def test_how_many_lie_beside_each_other(model: nn.Module, name: str) -> None:
    for number in (0, 11):
        assert name.format(number) in dict(model.named_parameters())
        found = expert_name(name.format(number))
        assert found is not None
        assert found.beside(model) == 12


@pytest.mark.parametrize("patterns", [[p, p.replace("layers.1", "layers.2")] for p in BY_NUMBER])
def test_model_order(patterns: list[str]) -> None:
    """Two ranks with six experts of each of two layers, and what both have between the layers."""

    def of(experts: range) -> list[str]:
        first, second = ([pattern.format(number) for number in experts] for pattern in patterns)
        return ["first.weight", *first, "between.weight", *second, "last.weight"]

    whole = list(dict.fromkeys(of(range(12))))
    assert model_order(of(range(6)) + of(range(6, 12))) == whole


def test_model_order_of_several_parameters_of_an_expert() -> None:
    def of(experts: range, name: str) -> list[str]:
        return [name.format(number).replace("up", part) for number in experts for part in ("up", "down")]

    for name in (DEEPSPEED, MODULES):
        assert model_order(of(range(2), name) + of(range(2, 4), name)) == of(range(4), name)
    weights = [f"mlp.experts.linear_fc{layer}.weight{{}}" for layer in (1, 2)]
    ranks = [[w.format(number) for w in weights for number in experts] for experts in (range(2), range(2, 4))]
    assert model_order(ranks[0] + ranks[1]) == [w.format(number) for w in weights for number in range(4)]
