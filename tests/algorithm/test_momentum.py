"""A decay that rises: averages stay unbiased, and the step count alone says where it is."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ds_shampoo import SettingsError, Shampoo
from ds_shampoo.algorithm.momentum import MomentumSchedule

decays = st.floats(0, 0.999)


@given(decays, st.integers(0, 40), decays, st.integers(1, 100))
def test_it_rises_in_equal_parts_and_then_stays(beta1: float, steps: int, start: float, step: int) -> None:
    schedule = MomentumSchedule(beta1, steps, start)
    found = [schedule.at(number) for number in range(1, steps + 3)]
    assert found[0] == pytest.approx(min(start, beta1) if steps else beta1)
    assert found[-2:] == [beta1, beta1]
    rises = [b - a for a, b in itertools.pairwise(found)][:steps]
    assert rises == pytest.approx([max(0.0, beta1 - start) / steps] * steps if steps else [])
    product = math.prod(schedule.at(number) for number in range(1, step + 1))
    assert schedule.product(step) == pytest.approx(product, rel=1e-12, abs=2**-60)


@given(decays, decays, st.integers(1, 1000))
def test_without_steps_it_is_a_power(beta1: float, start: float, step: int) -> None:
    """To the bit: no run without a warm-up changes."""
    schedule = MomentumSchedule(beta1, 0, start)
    assert (schedule.at(step), schedule.product(step)) == (beta1, beta1**step)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("momentum", ["before", "after"])
def test_the_average_of_equal_gradients_is_the_gradient(momentum: str, nesterov: bool) -> None:
    weight = nn.Parameter(torch.zeros(5))
    optimizer = Shampoo(
        [weight], lr=0.5, grafting="sgd", momentum=momentum, nesterov=nesterov, momentum_warmup_steps=6,
        momentum_warmup_start=0.2,
    )  # fmt: skip
    grad = torch.arange(1.0, 6.0)
    for step in range(1, 12):
        weight.grad = grad.clone()
        optimizer.step()
        torch.testing.assert_close(weight.detach(), -0.5 * step * grad, rtol=1e-5, atol=1e-6)


def test_it_goes_on_where_it_was() -> None:
    settings: dict[str, Any] = {"momentum_warmup_steps": 10, "block_size": 4, "root_overlap": False}
    weight, resumed = (nn.Parameter(torch.ones(6, 5)) for _ in range(2))
    optimizer = Shampoo([weight], **settings)

    def run(optimizer: Shampoo, param: nn.Parameter, steps: range) -> None:
        for step in steps:
            param.grad = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
            optimizer.step()

    run(optimizer, weight, range(4))
    with torch.no_grad():
        resumed.copy_(weight)
    other = Shampoo([resumed], **settings)
    other.load_state_dict(optimizer.state_dict())
    run(optimizer, weight, range(4, 14))
    run(other, resumed, range(4, 14))
    assert torch.equal(weight, resumed)


@pytest.mark.parametrize(("key", "value"), [("steps", -1), ("steps", 1.5), ("steps", 10**6), ("start", 1.0)])
def test_what_is_no_warm_up_is_refused(key: str, value: float) -> None:
    with pytest.raises(SettingsError, match=f"'momentum_warmup_{key}' = {value}"):
        Shampoo([nn.Parameter(torch.ones(2, 2))], **{f"momentum_warmup_{key}": value})  # type: ignore[arg-type]
