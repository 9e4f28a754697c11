"""A model that several engines train one after another, layers frozen in between, and weights that nobody trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.distributed.jobs import SHAMPOO, engine_config, flat
from tests.distributed.pool import WorkerPool

Pools = Callable[[int], WorkerPool]
WIDTH = 24


class Head(nn.Module):
    """Layers [WIDTH, WIDTH] and a head, with a loss of its own."""

    def __init__(self, body: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body or nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.head = nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body:
            x = x + torch.tanh(layer(x))
        return (self.head(x) - 1.0).float().square().mean()


class LowRank(nn.Module):
    """A frozen layer and a trained correction of rank 4."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(WIDTH, 4, bias=False)
        self.up = nn.Linear(4, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def frozen(model: Head) -> Head:
    model.body.requires_grad_(False)
    return model


def partly_frozen(model: Head) -> Head:
    model.body[1].requires_grad_(False)
    model.head.bias.requires_grad_(False)
    return model


def low_rank(model: Head) -> Head:
    for number, layer in enumerate(model.body):
        model.body[number] = LowRank(layer)
    model.head.requires_grad_(False)
    return model


def new_head(model: Head) -> Head:
    return Head(model.body.requires_grad_(False))


def swapped(model: Head) -> Head:
    """What was trained is frozen, and the other way round: as generators and discriminators that take turns."""
    for parameter in model.parameters():
        parameter.requires_grad_(not parameter.requires_grad)
    return model


def phase(model: nn.Module, config: dict[str, Any]) -> list[float]:
    """Some steps of an engine of its own, through the import alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    sent = {"model_parameters": parameters} if config.pop("only_trained", False) else {}
    engine, *_ = deepspeed.initialize(model=model, config={**config, "zero_allow_untested_optimizer": True}, **sent)
    before = flat(model)
    sizes = [(p.ds_numel if hasattr(p, "ds_id") else p.numel(), p.requires_grad) for p in model.parameters()]
    trained = torch.cat([torch.full((size,), requires_grad) for size, requires_grad in sizes])
    losses = []
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0)).to(next(model.parameters()).dtype)
    for _ in range(4):
        loss = engine(x)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    moved = torch.from_numpy(flat(model) != before)
    assert not moved[~trained].any(), "a frozen weight moved"
    assert moved[trained].any()
    if config["zero_optimization"]["stage"] == 3:
        for parameter in model.parameters():
            parameter.ds_active_sub_modules.clear()
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            values = [p.detach().clone() for p in model.parameters()]
    engine.destroy()
    if config["zero_optimization"]["stage"] == 3:  # DeepSpeed leaves pieces behind
        replace_parameters(model, values)
    return losses


def replace_parameters(model: nn.Module, values: list[Tensor]) -> None:
    """New parameters of these values, as a user has to make them after an engine at stage 3."""
    found = iter(values)
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(next(found), requires_grad=parameter.requires_grad)


def phases(config: dict[str, Any], change: Callable[[Any], Any], first_frozen: bool) -> list[list[float]]:
    torch.manual_seed(0)
    model = Head()
    if first_frozen:
        model.head.requires_grad_(False)
    losses = [phase(model, dict(config))]
    torch.manual_seed(1)
    model = change(model)
    return [*losses, phase(model, dict(config))]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("change", [frozen, partly_frozen, low_rank, new_head, swapped], ids=lambda f: f.__name__)
@pytest.mark.parametrize("only_trained", [False, True], ids=["all", "trained"])
def test_phases(pools: Pools, stage: int, change: Callable[[Any], Any], only_trained: bool) -> None:
    settings = {**SHAMPOO, "lr": 0.01}
    config = engine_config(settings, stage, 2, precision="bf16" if stage else "fp32")
    if only_trained:
        config["only_trained"] = True
    for first, second in pools(2).run(phases, config, change, change is swapped):
        assert first[-1] < first[0]
        assert second[-1] < second[0]


class Packed(nn.Module):
    """A frozen weight of bytes."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        values = (torch.arange(rows * columns) % 256).to(torch.uint8).reshape(rows, columns)
        self.weight = nn.Parameter(values, requires_grad=False)


class Quantised(nn.Module):
    """A frozen weight of bytes, shaped [n, 1] as bitsandbytes' are, before and among what is trained on top of it."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))  # DeepSpeed's stage 3 refuses a model that begins with bytes
        self.packed = Packed(rows, columns)
        self.low = LowRank(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        base = (self.packed.weight.reshape(WIDTH, WIDTH).to(x.dtype) - 127.0) / 1024.0
        return (self.low(x * self.scale) + F.linear(x, base) - 1.0).float().square().mean()


def quantised(config: dict[str, Any], rows: int, grouped: bool) -> tuple[list[float], str, bool]:
    torch.manual_seed(0)
    model = Quantised(rows, WIDTH * WIDTH // rows)
    before = model.packed.weight.detach().clone()
    members = sorted(model.parameters(), key=torch.is_floating_point)  # bytes first
    groups = [{"params": members[:3]}, {"params": members[3:]}] if grouped else members
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    losses = []
    x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0)).to(model.low.up.weight.dtype)
    for _ in range(4):
        loss = engine(x)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    table = engine.basic_optimizer.describe()
    with deepspeed.zero.GatheredParameters([model.packed.weight], enabled=hasattr(model.packed.weight, "ds_id")):
        same = torch.equal(model.packed.weight, before)
    engine.destroy()
    return losses, table, same


@pytest.mark.parametrize("grouped", [False, True], ids=["list", "groups"])
@pytest.mark.parametrize("rows", [WIDTH * WIDTH, WIDTH], ids=["packed", "matrix"])
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16")])
def test_quantised_weights(pools: Pools, stage: int, precision: str, rows: int, grouped: bool) -> None:
    config = engine_config({**SHAMPOO, "lr": 0.01}, stage, 2, precision=precision)
    config["zero_allow_untested_optimizer"] = True
    for losses, table, same in pools(2).run(quantised, config, rows, grouped):
        assert losses[-1] < losses[0]
        assert "not trained (torch.uint8)" in table
        assert same
