"""The root keeper: what is refreshed, skipped, rejected, given up and taken up again, and that all of it is counted."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ds_shampoo.algorithm.blocks import cut
from ds_shampoo.algorithm.preconditioners import PRECONDITIONERS, Preconditioner, ShampooPreconditioner
from ds_shampoo.config import GroupSettings, parse
from ds_shampoo.roots.jobs import relative_move
from ds_shampoo.roots.keeper import RootCounts, RootKeeper
from ds_shampoo.roots.schedule import turns_of
from ds_shampoo.roots.service import RootService

BETA = 0.5


def make(
    blocks: int = 1, delay: int = 0, overlap: bool = False, preconditioner: str = "shampoo"
) -> tuple[Preconditioner, RootKeeper, RootCounts]:
    """A stack of blocks whose roots are due `delay` steps after their boundary; all of them at step 1, 2, ..."""
    blocked = cut("w", (4 * blocks, 3), block_size=4)
    assert blocked is not None
    stack = PRECONDITIONERS[preconditioner](blocked.blocks, torch.device("cpu"), torch.float32)
    counts = RootCounts()
    service = RootService(
        parse({"root_overlap": overlap, "root_delay": delay, "root_interval": max(delay, 1)}), torch.device("cpu")
    )
    return stack, RootKeeper(stack, [0] * blocks, service, counts), counts


def grads(seed: int, blocks: int = 1) -> torch.Tensor:
    return torch.randn(blocks, 4, 3, generator=torch.Generator().manual_seed(seed))


def spoiled(seed: int, blocks: int) -> torch.Tensor:
    """Gradients of which the first block's has an element that is no number."""
    gradients = grads(seed, blocks)
    gradients[0, 1, 1] = math.nan
    return gradients


def settings(**changed: object) -> GroupSettings:
    return GroupSettings(**{"statistics_beta": BETA, "root_interval": 1, **changed})


def test_a_statistic_that_did_not_move_is_rescaled_and_one_that_did_is_solved() -> None:
    stack, keeper, counts = make()
    chosen = settings(root_refresh_threshold=0.05)
    stack.update(grads(0), [0], BETA)
    keeper.advance([1], chosen)
    first = stack.roots[0][0].clone()
    assert (counts.updates, counts.skipped) == (2, 0)

    for factor in stack.factors:
        factor.mul_(16.0)
    keeper.advance([2], chosen)
    assert (counts.updates, counts.skipped) == (2, 2)
    assert torch.allclose(stack.roots[0][0], first / 2, rtol=1e-5)  # 16 ** (-1 / 4)
    assert keeper.age(0, 2) == 0

    stack.update(grads(1), [0], BETA)
    keeper.advance([3], chosen)
    assert (counts.updates, counts.skipped) == (4, 2)


def test_the_threshold_is_off_by_default() -> None:
    stack, keeper, counts = make()
    for step in (1, 2, 3):
        stack.update(grads(0), [0], BETA)
        keeper.advance([step], settings())
    assert (counts.updates, counts.skipped) == (6, 0)
    assert keeper.block_state(0)["rooted"] == []


def test_rejected_roots_stay_then_give_way_and_come_back(caplog: pytest.LogCaptureFixture) -> None:
    stack, keeper, counts = make(blocks=2)
    chosen = settings(max_root_failures=2)
    stack.update(grads(0, 2), [0, 1], BETA)
    keeper.advance([1, 1], chosen)
    old = stack.roots[0][0].clone()

    with caplog.at_level(logging.WARNING, "ds_shampoo"):
        stack.update(spoiled(1, 2), [0, 1], BETA)
        keeper.advance([2, 2], chosen)
        assert counts.rejected == 2
        assert stack.ready == [True, True]
        assert torch.equal(stack.roots[0][0], old)
        stack.update(spoiled(2, 2), [0, 1], BETA)
        keeper.advance([3, 3], chosen)
        assert stack.ready == [False, True]
        assert keeper.age(0, 3) is None
        stack.update(grads(3, 2), [0, 1], BETA)
        keeper.advance([4, 4], chosen)
    assert stack.ready == [True, True]
    assert counts.rejected == 4
    assert counts.restarted == 2
    messages = " ".join(record.getMessage() for record in caplog.records)
    assert "w[0]" in messages
    assert "number 1 of this block, 1 of this rank's blocks in all" in messages
    assert keeper.block_state(0)["setbacks"] == 2
    assert "goes on without roots: by its grafting step from now on" in messages
    assert "is preconditioned again" in messages


@pytest.mark.parametrize("preconditioner", sorted(PRECONDITIONERS))
def test_without_roots_the_identity_stands_for_them(caplog: pytest.LogCaptureFixture, preconditioner: str) -> None:
    stack, keeper, _ = make(blocks=2, preconditioner=preconditioner)
    chosen, moves = settings(max_root_failures=1), preconditioner != "shampoo"
    fresh = stack.apply(grads(7, 2), torch.empty(2, 4, 3)).clone()
    assert stack.directed == [moves, moves]
    stack.update(grads(0, 2), [0, 1], BETA)
    keeper.advance([1, 1], chosen)
    before = keeper.block_state(0), stack.block_state(0)
    rooted = stack.apply(grads(7, 2), torch.empty(2, 4, 3)).clone()
    assert not torch.allclose(rooted, fresh, rtol=0.1)
    with caplog.at_level(logging.WARNING, "ds_shampoo"):
        stack.update(spoiled(1, 2), [0, 1], BETA)
        keeper.advance([2, 2], chosen)
    after = stack.apply(grads(7, 2), torch.empty(2, 4, 3))
    assert stack.directed == [moves, True]
    assert torch.equal(after[0], fresh[0])
    assert not torch.allclose(after[1], fresh[1], rtol=0.1)
    assert ("by its momentum's own direction" in caplog.text) == moves

    # So it is in a job that takes up the checkpoint of such a block, or of one with roots of another order.
    for state, settings_then in (
        ((keeper.block_state(0), stack.block_state(0)), chosen),
        (before, settings(inverse_exponent_override=7)),
    ):
        other, others_keeper, _ = make(blocks=2, preconditioner=preconditioner)
        other.load_block_state(0, {**state[1], "roots": [torch.zeros(4, 4), torch.zeros(3, 3)]})
        others_keeper.load_block_state(0, state[0], settings_then)
        assert other.ready == [False, False]
        assert torch.equal(other.apply(grads(7, 2), torch.empty(2, 4, 3))[0], fresh[0])


def test_a_block_that_never_had_a_gradient_waits() -> None:
    stack, keeper, counts = make()
    keeper.advance([1], settings())
    stack.update(torch.zeros(1, 4, 3), [0], BETA)
    keeper.advance([2], settings())
    assert stack.ready == [False]
    assert (counts.updates, counts.rejected) == (0, 0)


@pytest.mark.parametrize("threshold", [0.0, 0.1])
def test_state_goes_round_with_jobs_under_way(threshold: float) -> None:
    chosen = settings(root_refresh_threshold=threshold, root_interval=3)
    stack, keeper, _ = make(delay=3)
    for step in range(1, 16):  # roots of step 11 in force since step 13, those of step 14 due at step 17
        stack.update(grads(step), [0], BETA)
        keeper.advance([step], chosen)
    other_stack, other, _ = make(delay=3)
    other_stack.load_block_state(0, stack.block_state(0))
    other.load_block_state(0, keeper.block_state(0), chosen)
    assert keeper.block_state(0)["pending"]["due_at"] == 17
    assert other.age(0, 15) == keeper.age(0, 15) == 4
    for step in range(16, 22):
        for each, keeping in ((stack, keeper), (other_stack, other)):
            each.update(grads(step), [0], BETA)
            keeping.advance([step], chosen)
        assert all(torch.equal(a, b) for a, b in zip(stack.roots, other_stack.roots, strict=True))


@pytest.mark.parametrize("overlap", [False, True])
def test_roots_are_those_of_the_boundary_and_come_when_they_are_due(overlap: bool) -> None:
    stack, keeper, counts = make(delay=2, overlap=overlap)
    now, now_keeper, _ = make()
    chosen = settings(root_interval=4)
    due = {1: 2, 2: 3, 3: 4, 5: 6, 8: 10, 12: 14}  # after a quarter of the steps, from the eighth on after two
    begun: dict[int, list[torch.Tensor]] = {}
    for step in range(1, 16):
        for each, keeping in ((stack, keeper), (now, now_keeper)):
            each.update(grads(step), [0], BETA)
            keeping.advance([step], chosen)
        if step in due:
            begun[step] = [root.clone() for root in now.roots]
        arrived = [at for at in begun if due[at] <= step]
        assert stack.ready == [step >= 2]
        assert counts.updates == 2 * len(arrived)
        if arrived:
            assert all(map(torch.equal, stack.roots, begun[arrived[-1]]))
            assert keeper.age(0, step) == step - arrived[-1]


def test_a_parameter_without_gradient_is_left_alone() -> None:
    stack, keeper, counts = make()
    stack.update(grads(0), [0], BETA)
    keeper.advance([0], settings())
    assert counts.updates == 0


@hypothesis_settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.data(), st.integers(1, 9), st.integers(1, 7), st.integers(1, 5))
def test_age_never_exceeds_interval_and_delay(
    interval: int, data: st.DataObject, start: int, blocks: int, statistics_interval: int
) -> None:
    delay = data.draw(st.integers(0, interval))
    blocked = cut("w", (2 * blocks, 2), block_size=2)
    assert blocked is not None
    stack = ShampooPreconditioner(blocked.blocks, torch.device("cpu"))
    service = RootService(
        parse({"root_overlap": False, "root_delay": delay, "root_interval": interval}), torch.device("cpu")
    )
    keeper = RootKeeper(stack, turns_of(blocked.blocks), service, RootCounts())
    chosen = settings(root_interval=interval, start_preconditioning_step=start, statistics_interval=statistics_interval)
    for step in range(1, start + 4 * interval + delay):
        if (step - 1) % statistics_interval == 0:
            stack.update(torch.ones(blocks, 2, 2), range(blocks), BETA)
        keeper.advance([step] * blocks, chosen)
        for slot in range(blocks):
            age = keeper.age(slot, step)
            if age is not None:
                assert age < interval + delay
            elif step >= start + interval - 1 + delay:
                pytest.fail(f"no root in force at step {step}")


def test_relative_move_is_blind_to_scale() -> None:
    matrix = torch.diag(torch.tensor([3.0, 4.0]))
    assert relative_move(matrix, 2 * matrix) == pytest.approx((0.0, 2.0), abs=1e-6)
    moved, scale = relative_move(matrix, torch.diag(torch.tensor([4.0, 3.0])))
    assert moved == pytest.approx(0.2 * math.sqrt(2))
    assert scale == pytest.approx(1.0)


def test_what_is_zero_or_not_finite_has_moved_far() -> None:
    tiny = torch.full((3, 3), 1e-30)  # its squares underflow in fp32
    assert relative_move(tiny, 2 * tiny) == (0.0, pytest.approx(2.0))
    assert relative_move(tiny, torch.full((3, 3), 1e30))[0] == pytest.approx(0.0, abs=1e-6)
    for odd in (torch.zeros(3, 3), torch.full((3, 3), math.inf), torch.full((3, 3), math.nan)):
        assert relative_move(odd, tiny) == relative_move(tiny, odd) == (math.inf, 1.0)


def test_a_root_that_overflows_is_rejected(caplog: pytest.LogCaptureFixture) -> None:
    stack, keeper, counts = make()
    stack.update(1e-18 * grads(0), [0], BETA)
    with caplog.at_level(logging.WARNING, "ds_shampoo"):
        keeper.advance([1], settings(inverse_exponent_override=1))
    assert (counts.updates, counts.rejected) == (1, 1)  # the factor of four rows has rank 3
    assert not stack.ready[0]
    assert "the root overflows torch.float32" in caplog.text


def test_roots_of_another_order_are_dropped_and_the_statistics_kept() -> None:
    stack, keeper, _ = make()
    stack.update(grads(0), [0], BETA)
    keeper.advance([1], settings())
    saved = {**stack.block_state(0), **keeper.block_state(0)}

    same, same_keeper, _ = make()
    same.load_block_state(0, saved)
    same_keeper.load_block_state(0, saved, settings())
    assert same.ready == [True]

    other, other_keeper, _ = make()
    other.load_block_state(0, saved)
    other_keeper.load_block_state(0, saved, settings(inverse_exponent_override=8))
    assert other.ready == [False]
    assert torch.equal(other.factors[0], stack.factors[0])
    other_keeper.advance([2], settings(inverse_exponent_override=8))
    assert other.ready == [True]
    assert torch.allclose(other.roots[0][0] @ other.roots[0][0], stack.roots[0][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_restarted_slot_is_as_if_just_built(overlap: bool) -> None:
    (stack, keeper, _), (fresh, fresh_keeper, _) = make(2, 2, overlap), make(2, 2, overlap)
    chosen = settings(root_interval=2)
    for step in range(1, 6):
        stack.update(grads(step, 2), [0, 1], BETA)
        keeper.advance([step, step], chosen)
    other = [root[1].clone() for root in stack.roots]
    assert "pending" in keeper.block_state(0)
    keeper.restart([0])
    assert all(map(torch.equal, other, [root[1] for root in stack.roots]))
    assert (stack.ready, stack.updates) == ([False, True], [0, 5])
    assert keeper.age(0, 5) is None
    assert keeper.block_state(0) == fresh_keeper.block_state(0)
    for step in range(1, 7):
        for each, keeping in ((stack, keeper), (fresh, fresh_keeper)):
            each.update(grads(10 + step, 2), [0, 1], BETA)
            keeping.advance([step, step], chosen)
        assert all(torch.equal(a[0], b[0]) for a, b in zip(stack.roots, fresh.roots, strict=True))
        assert stack.ready[0] == fresh.ready[0]


def damaged(state: dict[str, object], key: str, odd: object) -> dict[str, object]:
    """A state in which something is missing (None), or is something else."""
    if key.startswith("pending."):
        return {**state, "pending": damaged(dict(state["pending"]), key.removeprefix("pending."), odd)}  # type: ignore[call-overload]
    return {k: v for k, v in state.items() if k != key} if odd is None else {**state, key: odd}


@pytest.mark.parametrize(
    ("key", "odd"),
    [
        *((key, None) for key in ("factors", "roots", "updates", "ready", "rooted", "solved", "failures", "rooted_at")),
        *((f"pending.{key}", None) for key in ("begun_at", "due_at", "snapshots", "corrections")),
        ("factors", [torch.zeros(3), torch.zeros(9)]),
        ("roots", [torch.zeros(4, 4), torch.zeros(4, 4)]),
        ("roots", [torch.zeros(4, 4)]),
        ("updates", -1),
        ("solved", [True]),
        ("rooted_traces", [1.0, 2.0, 3.0]),
        ("rooted", [torch.zeros(2, 2), torch.zeros(3, 3)]),
        ("pending.snapshots", [torch.zeros(16)]),
        ("pending.snapshots", [torch.zeros(16), torch.zeros(4)]),
        ("pending.corrections", [1.0, 0.0]),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(key: str, odd: object) -> None:
    stack, keeper, _ = make(delay=2, overlap=True)
    chosen = settings(root_interval=2)
    for step in range(1, 6):
        stack.update(grads(step), [0], BETA)
        keeper.advance([step], chosen)
    before = copy.deepcopy({**stack.block_state(0), **keeper.block_state(0)})
    state = damaged(before, key, odd)
    with pytest.raises(ValueError, match=r"block w\[0\]"):  # noqa: PT012 - which of the two halves refuses it
        stack.load_block_state(0, state)
        keeper.load_block_state(0, state, chosen)
    after = {**stack.block_state(0), **keeper.block_state(0)}
    assert str(after) == str(before)
    keeper.advance([6], chosen)


def test_states_of_earlier_releases_are_taken_up() -> None:
    stack, keeper, _ = make(delay=2)
    chosen = settings(root_interval=2)
    for step in range(1, 6):
        stack.update(grads(step), [0], BETA)
        keeper.advance([step], chosen)
    saved = {**stack.block_state(0), **keeper.block_state(0)}
    old = {k: v for k, v in saved.items() if k not in ("rooted_traces", "rooted_updates")}
    old["pending"] = {k: v for k, v in saved["pending"].items() if k != "updates"}
    other, other_keeper, counts = make(delay=2)
    other.load_block_state(0, old)
    other_keeper.load_block_state(0, old, chosen)
    for step in range(6, 10):
        for each, keeping in ((stack, keeper), (other, other_keeper)):
            each.update(grads(step), [0], BETA)
            keeping.advance([step], chosen)
    assert all(map(torch.equal, stack.roots, other.roots))
    assert counts.skipped == 0


@pytest.mark.parametrize("method", ["eigh", "newton"])
def test_the_jobs_default_dtype_and_device_are_nothing_to_roots(method: str) -> None:
    (stack, keeper, _), (other, other_keeper, _) = make(), make()
    chosen = settings(root_method=method)
    gradient = grads(0)
    gradient[:, 2] = 0.0  # a row without gradients is left out, and put back in
    stack.update(gradient, [0], BETA)
    keeper.advance([1], chosen)
    for factor, own in zip(other.factors, stack.factors, strict=True):
        factor.copy_(own)
    other.updates = [1]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            other_keeper.advance([1], chosen)
    finally:
        torch.set_default_dtype(torch.float32)
    assert stack.ready == other.ready == [True]
    assert all(map(torch.equal, stack.roots, other.roots))
