"""`torch.compile` around a step: the step itself runs as written, with the same bits, and the rest is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from ds_shampoo import Shampoo


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(wrapped: Callable[[Callable[[], None]], Callable[[], None]], whole: bool, overlap: bool) -> list[Any]:
    """Weights and losses of six steps, of which only `Shampoo.step` or the whole step is `wrapped`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 9))
    optimizer = Shampoo(
        model.parameters(), lr=0.01, block_size=8, root_interval=2, root_delay=1, root_overlap=overlap,
        grafting="adam_normalized",
    )  # fmt: skip
    inputs, losses = torch.randn(5, 12), []

    def loss_of() -> torch.Tensor:
        return model(inputs).square().mean()

    def step() -> None:
        loss = loss_of()
        loss.backward()
        losses.append(loss.detach())
        taken()
        optimizer.zero_grad()

    taken = optimizer.step if whole else wrapped(optimizer.step)
    run = wrapped(step) if whole else step
    for _ in range(6):
        run()
    assert optimizer.metrics()["preconditioned_blocks"] == 12
    return [*losses, *(param.detach() for param in model.parameters())]


def compiled(function: Callable[[], None]) -> Callable[[], None]:
    return torch.compile(function, backend="eager")  # type: ignore[no-any-return]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("whole", [False, True], ids=["optimizer.step", "training-step"])
def test_a_compiled_step_has_the_same_bits(whole: bool, overlap: bool) -> None:
    plain = trained(lambda function: function, whole, overlap)
    assert all(map(torch.equal, trained(compiled, whole, overlap), plain))


def test_nothing_of_the_step_is_traced() -> None:
    """A traced step would be compiled again at each new step count."""
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = Shampoo([weight], root_overlap=False)
    compilations = CompileCounter()
    step = torch.compile(optimizer.step, backend=compilations)
    for _ in range(3):
        weight.grad = torch.ones(4, 4)
        step()
    assert compilations.frame_count == 0
    assert optimizer.state[weight]["step"] == 3


@pytest.mark.parametrize("preconditioner", ["shampoo", "spectral", "polar"])
def test_the_default_backend(preconditioner: Any) -> None:
    """Inductor has nothing to compile, so that no compiler is needed."""
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = Shampoo([weight], root_overlap=False, preconditioner=preconditioner)
    weight.grad = torch.eye(4)
    torch.compile(optimizer.step)()
    assert not torch.equal(weight, torch.ones(4, 4))
