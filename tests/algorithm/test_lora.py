"""LoRA's factors have a preconditioner on their rank's side only: what it takes, and that it costs no quality."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_shampoo import Shampoo
from ds_shampoo.algorithm.selection import Role, kinds

WIDTH, RANK, BATCH, STEPS = 32, 4, 32, 150
BOTH_SIDES = {"roles": {"*lora_*": "weight"}}


class Lora(nn.Module):
    """A linear layer with an adapter, as PEFT builds it."""

    def __init__(self, base: nn.Linear, rank: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        rows, columns = base.weight.shape
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(columns, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, rows, bias=False)})
        with torch.no_grad():
            if generator is not None:
                self.a.copy_(torch.randn(rank, columns, generator=generator) / columns**0.5)
            self.b.zero_()

    @property
    def a(self) -> Tensor:
        weight: Tensor = self.lora_A["default"].weight  # type: ignore[assignment]
        return weight

    @property
    def b(self) -> Tensor:
        weight: Tensor = self.lora_B["default"].weight  # type: ignore[assignment]
        return weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))
        return y


def described(width: int, rank: int, **settings: Any) -> str:
    model = nn.ModuleDict({"layer": Lora(nn.Linear(width, width, bias=False), rank)})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Shampoo(trained, model=model, **settings).describe()


def total(table: str) -> str:
    found = re.search(r"blocks, (\S+ \S+) over all ranks", " ".join(table.split()))
    assert found is not None, table
    return found[1]


@pytest.mark.parametrize(
    ("settings", "taken"),
    [
        ({"preconditioner": "shampoo"}, "4.0 KiB"),
        ({"preconditioner": "shampoo", **BOTH_SIDES}, "14.1 MiB"),
        ({"preconditioner": "shampoo", **BOTH_SIDES, "max_factor_ratio": None}, "50.0 MiB"),
        ({}, "516.0 KiB"),  # and a gradient of 2 x 16 x 4096
    ],
)
def test_bytes_of_a_pair_of_rank_16_at_4096(settings: dict[str, Any], taken: str) -> None:
    assert total(described(4096, 16, **settings)) == taken


def test_the_long_side_is_whole_and_has_no_factor() -> None:
    lines = described(4096, 16).splitlines()
    assert any("lora_A" in line and "1 of 16 x 4096" in line for line in lines)
    assert any("lora_B" in line and "1 of 4096 x 16" in line for line in lines)


def shapes(named: list[tuple[str, nn.Parameter]], **settings: Any) -> dict[str, list[tuple[int, ...]]]:
    """By name, the shapes of all factors that a step leaves."""
    optimizer = Shampoo(named, root_overlap=False, **settings)
    for _, parameter in named:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return {
        name: [
            tuple(root.shape)
            for block in optimizer.state[parameter].get("blocks", {}).values()
            for root in block["roots"].values()
        ]
        for name, parameter in named
    }


@pytest.mark.parametrize(
    ("name", "shape", "settings", "expected"),
    [
        ("a.q.lora_A.default.weight", (4, 20), {}, [(4, 4)]),
        ("a.q.lora_B.default.weight", (20, 4), {}, [(4, 4)]),
        ("a.q.lora_B.default.weight", (3, 4), {}, [(4, 4)]),
        ("a.conv.lora_A.default.weight", (4, 6, 3, 3), {"block_size": 8}, [(4, 4)]),
        ("a.conv.lora_B.default.weight", (6, 4, 1, 1), {}, [(4, 4)]),
        ("a.q.lora_A.default.weight", (4, 20), BOTH_SIDES, [(4, 4), (20, 20)]),
        ("a.q.lora_A.default.weight", (4, 20), {"roles": {"*": "none"}}, []),
        ("a.q.lora_A.default.weight", (12, 20), {"block_size": 8}, [(8, 8), (4, 4)]),
        ("a.my_down.weight", (4, 20), {}, [(4, 4), (20, 20)]),
        ("a.my_down.weight", (4, 20), {"roles": {"*my_*": "lora"}}, [(4, 4)]),
        ("a.my_up.weight", (20, 4), {"roles": {"*my_*": "lora"}}, [(4, 4)]),
        ("a.my_scale", (), {"roles": {"*my_*": "lora"}}, []),
        ("a.my_scale", (7,), {"roles": {"*my_*": "lora"}}, []),
        ("lm_head.lora_A.default.weight", (4, 20), {}, []),
        ("lm_head.lora_A.default.weight", (4, 20), {"embedding": "one_sided"}, [(4, 4)]),
        ("lm_head.lora_B.default.weight", (90, 4), {"embedding": "blocked"}, [(4, 4)]),
    ],
)
def test_which_sides_are_preconditioned(
    name: str, shape: tuple[int, ...], settings: dict[str, Any], expected: list[tuple[int, ...]]
) -> None:
    assert shapes([(name, nn.Parameter(torch.zeros(shape)))], **settings)[name] == expected


def test_its_role() -> None:
    model = nn.ModuleDict({"layer": Lora(nn.Linear(6, 5), 2)})
    found = {name: kinds(model)[id(p)] for name, p in model.named_parameters()}
    assert found["layer.lora_A.default.weight"].role is found["layer.lora_B.default.weight"].role is Role.LORA
    assert found["layer.base_layer.weight"].role is Role.WEIGHT


def network(seed: int) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    layers: list[Lora] = []
    for _ in range(2):
        base = nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            base.weight.copy_(torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5)
        layers.append(Lora(base, RANK, generator))
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def inputs(seed: int) -> Iterator[Tensor]:
    """Of uneven scales, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(BATCH, WIDTH, generator=generator) * 3 * torch.logspace(0, -1.5, WIDTH)


def error(make: Callable[[list[nn.Parameter], nn.Module], torch.optim.Optimizer], seed: int) -> float:
    """What is left of a teacher's variance, whose adapters are to be learned."""
    model, teacher, generator = network(seed), network(seed), torch.Generator().manual_seed(seed + 50)
    with torch.no_grad():
        for layer in (teacher[0], teacher[2]):
            assert isinstance(layer, Lora)
            layer.a.copy_(torch.randn(RANK, WIDTH, generator=generator) * 3 / WIDTH**0.5)
            layer.b.copy_(torch.randn(WIDTH, RANK, generator=generator))
    optimizer = make([p for p in model.parameters() if p.requires_grad], model)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, STEPS)
    for _, x in zip(range(STEPS), inputs(seed), strict=False):
        with torch.no_grad():
            y = teacher(x)
        optimizer.zero_grad()
        ((model(x) - y) ** 2).mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        x = torch.cat([x for _, x in zip(range(16), inputs(seed + 1000), strict=False)])
        y = teacher(x)
        return float(((model(x) - y) ** 2).mean() / (y**2).mean())


def test_it_costs_under_a_tenth_against_both_sides() -> None:
    """Best of three learning rates for each; AdamW, whose step lengths both take, stands beside.

    Two seeds' ratios differ by up to a fifth, hence six of them.
    """
    rates = (0.02, 0.06, 0.2)
    best: dict[str, list[float]] = {"rank": [], "both": [], "adamw": []}
    for seed in range(6):
        for name in best:

            def make(
                trained: list[nn.Parameter], model: nn.Module, lr: float, name: str = name
            ) -> torch.optim.Optimizer:
                if name == "adamw":
                    return torch.optim.AdamW(trained, lr, weight_decay=0.0)
                settings = BOTH_SIDES if name == "both" else {}
                return Shampoo(  # type: ignore[arg-type]
                    trained, lr, model=model, preconditioner="shampoo", root_overlap=False, **settings
                )  # type: ignore[arg-type]

            best[name].append(min(error(lambda p, m, lr=lr: make(p, m, lr), seed) for lr in rates))  # type: ignore[misc]
    mean = {name: math.exp(sum(map(math.log, found)) / len(found)) for name, found in best.items()}
    print(mean)
    assert mean["rank"] < 1.1 * mean["both"]
    assert mean["rank"] < 1.1 * mean["adamw"]
