"""Closures, as in torch's optimizers: called before the step, with gradients enabled, and their loss given back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from ds_shampoo import BrokenStepError, Shampoo
from ds_shampoo.step.elementwise import ElementwiseStep
from tests.test_optimizer import SETTINGS, copies, equal, parameter, run


def run_with_closure(optimizer: Shampoo, params: Sequence[nn.Parameter], steps: range) -> list[float | None]:
    """As `run`, with gradients that a closure computes."""
    losses = []
    for step in steps:
        targets = [torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) for p in params]

        def closure(targets: Sequence[torch.Tensor] = targets) -> float:
            optimizer.zero_grad()
            loss = sum(((p - target) ** 2).sum() for p, target in zip(params, targets, strict=True))
            loss.backward()
            return loss.item()

        losses.append(optimizer.step(closure))
    return losses


def test_a_closure_is_called_first() -> None:
    """The same losses and weights as those of a step after the closure; what it changes holds for its own step."""
    params = [parameter(6, 6), parameter(4)]
    other = copies(params)
    optimizer, plain = Shampoo(params, **SETTINGS), Shampoo(other, **SETTINGS)
    losses = run_with_closure(optimizer, params, range(8))
    for step, loss in enumerate(losses):
        plain.zero_grad()
        targets = [torch.randn(p.shape, generator=torch.Generator().manual_seed(step)) for p in other]
        own = sum(((p - target) ** 2).sum() for p, target in zip(other, targets, strict=True))
        own.backward()
        assert plain.step() is None
        assert loss == own.item()
    assert equal(params, other)
    assert optimizer.metrics()["preconditioned_blocks"] > 0

    def slower() -> float:
        optimizer.param_groups[0]["lr"] = 0.0
        optimizer.param_groups[0]["weight_decay"] = 0.0
        return 1.0

    before = copies(params)
    assert optimizer.step(slower) == 1.0
    assert equal(params, before)


def test_a_closure_that_fails_leaves_everything_alone() -> None:
    params = [parameter(6, 6)]
    optimizer = Shampoo(params, **SETTINGS)
    run(optimizer, params, range(4))
    weights, state = copies(params), copy.deepcopy(optimizer.state_dict())

    def closure() -> float:
        params[0].grad = torch.ones_like(params[0])
        raise ArithmeticError("no loss")

    with pytest.raises(ArithmeticError, match="no loss"):
        optimizer.step(closure)
    assert equal(params, weights)
    assert str(copy.deepcopy(optimizer.state_dict())) == str(state)
    other = Shampoo(weights, **SETTINGS)
    other.load_state_dict(state)
    run(optimizer, params, range(4, 8))
    run(other, weights, range(4, 8))
    assert equal(params, weights)


def test_a_closure_is_not_called_after_a_broken_step(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [parameter(6, 6)]
    optimizer = Shampoo(params, **SETTINGS)
    run(optimizer, params, range(2))
    with monkeypatch.context() as patch:
        patch.setattr(ElementwiseStep, "finish", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(optimizer, params, range(2, 3))
    called = []
    with pytest.raises(BrokenStepError):
        optimizer.step(lambda: called.append(1) or 0.0)  # type: ignore[func-returns-value]
    assert not called


def test_a_closure_runs_what_torch_compiled() -> None:
    """Dynamo is off within `step`, and has to be on within the closure."""
    compiled: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        compiled.append(1)
        return graph.forward

    model = nn.Linear(4, 4)
    fast = torch.compile(model, backend=backend)
    optimizer = Shampoo(model.parameters(), **SETTINGS)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = fast(torch.ones(2, 4)).square().sum()
        assert torch.is_grad_enabled()
        loss.backward()
        return loss

    loss = optimizer.step(closure)  # type: ignore[arg-type]
    assert isinstance(loss, torch.Tensor)
    assert compiled
