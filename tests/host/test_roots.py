"""The root keeper: what is refreshed, skipped, rejected, given up and taken up again, and that all of it is counted."""

import contextlib
import logging
import math

import pytest
import torch

from ds_shampoo.algorithm.blocks import cut
from ds_shampoo.algorithm.preconditioner import ShampooPreconditioner
from ds_shampoo.config import GroupSettings
from ds_shampoo.host.roots import RootCounts, RootKeeper, relative_move, single_threaded

BETA = 0.5


def make(blocks: int = 1) -> tuple[ShampooPreconditioner, RootKeeper, RootCounts]:
    blocked = cut("w", (4 * blocks, 3), block_size=4)
    assert blocked is not None
    stack, counts = ShampooPreconditioner(blocked.blocks, torch.device("cpu")), RootCounts()
    return stack, RootKeeper(stack, counts), counts


def grads(seed: int, blocks: int = 1) -> torch.Tensor:
    return torch.randn(blocks, 4, 3, generator=torch.Generator().manual_seed(seed))


def settings(**changed: object) -> GroupSettings:
    return GroupSettings(statistics_beta=BETA, **changed)


def test_a_statistic_that_did_not_move_is_rescaled_and_one_that_did_is_solved() -> None:
    stack, keeper, counts = make()
    chosen = settings(root_refresh_threshold=0.05)
    stack.update(grads(0), [0], BETA)
    keeper.refresh({0: 1}, chosen)
    first = stack.roots[0][0].clone()
    assert (counts.updates, counts.skipped) == (2, 0)

    for factor in stack.factors:
        factor.mul_(16.0)
    keeper.refresh({0: 2}, chosen)
    assert (counts.updates, counts.skipped) == (2, 2)
    assert torch.allclose(stack.roots[0][0], first / 2, rtol=1e-5)  # 16 ** (-1 / 4)
    assert keeper.age(0, 2) == 0

    stack.update(grads(1), [0], BETA)
    keeper.refresh({0: 3}, chosen)
    assert (counts.updates, counts.skipped) == (4, 2)


def test_the_threshold_is_off_by_default() -> None:
    stack, keeper, counts = make()
    stack.update(grads(0), [0], BETA)
    for step in (1, 2, 3):
        keeper.refresh({0: step}, settings())
    assert (counts.updates, counts.skipped) == (6, 0)
    assert keeper.block_state(0)["rooted"] == []


def test_rejected_roots_stay_then_give_way_and_come_back(caplog: pytest.LogCaptureFixture) -> None:
    stack, keeper, counts = make(blocks=2)
    chosen = settings(max_root_failures=2)
    stack.update(grads(0, 2), [0, 1], BETA)
    keeper.refresh({0: 1, 1: 1}, chosen)
    old = stack.roots[0][0].clone()

    healthy = [factor.clone() for factor in stack.factors]
    stack.factors[0][0].fill_(math.nan)
    with caplog.at_level(logging.WARNING, "ds_shampoo"):
        keeper.refresh({0: 2, 1: 2}, chosen)
        assert counts.rejected == 1
        assert stack.ready == [True, True]
        assert torch.equal(stack.roots[0][0], old)
        keeper.refresh({0: 3, 1: 3}, chosen)
        assert stack.ready == [False, True]
        assert keeper.age(0, 3) is None
        for factor, value in zip(stack.factors, healthy, strict=True):
            factor.copy_(value)
        keeper.refresh({0: 4, 1: 4}, chosen)
    assert stack.ready == [True, True]
    assert counts.rejected == 2
    messages = " ".join(record.getMessage() for record in caplog.records)
    assert "w[0]" in messages
    assert "takes its grafting step from now on" in messages
    assert "is preconditioned again" in messages


def test_a_block_that_never_had_a_gradient_waits() -> None:
    stack, keeper, counts = make()
    keeper.refresh({0: 1}, settings())
    stack.update(torch.zeros(1, 4, 3), [0], BETA)
    keeper.refresh({0: 2}, settings())
    assert stack.ready == [False]
    assert (counts.updates, counts.rejected) == (0, 0)


def test_state_goes_round_with_and_without_kept_statistics() -> None:
    for threshold in (0.0, 0.1):
        stack, keeper, _ = make()
        stack.update(grads(0), [0], BETA)
        keeper.refresh({0: 7}, settings(root_refresh_threshold=threshold))
        other = RootKeeper(stack, RootCounts())
        other.load_block_state(0, keeper.block_state(0))
        assert other.age(0, 9) == 2
        before, after = keeper.block_state(0), other.block_state(0)
        assert all(torch.equal(a, b) for a, b in zip(before.pop("rooted"), after.pop("rooted"), strict=True))
        assert before == after


def test_relative_move_is_blind_to_scale() -> None:
    matrix = torch.diag(torch.tensor([3.0, 4.0]))
    assert relative_move(matrix, 2 * matrix) == pytest.approx((0.0, 2.0), abs=1e-6)
    moved, scale = relative_move(matrix, torch.diag(torch.tensor([4.0, 3.0])))
    assert moved == pytest.approx(0.2 * math.sqrt(2))
    assert scale == pytest.approx(1.0)


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with contextlib.suppress(RuntimeError), single_threaded():
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == before
