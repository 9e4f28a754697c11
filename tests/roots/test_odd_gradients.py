"""Gradients that are huge once, or vanish for a while: what the whole optimizer makes of them."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

from ds_shampoo import Shampoo
from ds_shampoo.algorithm.triangle import packed_numel
from ds_shampoo.roots.jobs import Basis, RootJob, Verdict
from ds_shampoo.roots.transfer import HostCopy, Transfers

CPU = torch.device("cpu")


def regression(huge: float | None, steps: int, **changed: Any) -> tuple[Shampoo, torch.Tensor, list[float]]:
    """A linear layer that is fitted; at step 20 one element of its gradient is `huge`. The losses at the end."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(12, 10))
    target = torch.randn(12, 10, generator=generator)
    settings: dict[str, Any] = {
        "lr": 0.02, "preconditioner": "shampoo", "root_interval": 5, "root_delay": 2, "root_threads": 1,
        "momentum": "after",
    }  # fmt: skip
    optimizer, losses = Shampoo([weight], **{**settings, **changed}), []
    for step in range(steps):
        inputs = torch.randn(32, 10, generator=generator)
        loss = ((inputs @ (weight - target).mT) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        if step == 20 and huge is not None:
            assert weight.grad is not None
            weight.grad[3, 4] = huge
        optimizer.step()
        losses.append(float(loss.detach()))
    return optimizer, weight.detach(), losses


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("huge", [3e19, -1e30])
def test_one_huge_element_costs_a_block_its_statistics_once(
    huge: float, overlap: bool, caplog: pytest.LogCaptureFixture
) -> None:
    changed = {"root_overlap": overlap}
    with caplog.at_level(logging.WARNING, "ds_shampoo"):
        optimizer, weight, losses = regression(huge, 150, **changed)
    metrics = optimizer.metrics()
    assert metrics["statistics_restarted"] == 1
    assert metrics["preconditioned_blocks"] == 1
    assert metrics["root_age_max"] < 5 + 2
    assert metrics["roots_rejected"] == 2
    assert "block param_0[0]: the statistics were not finite" in caplog.text
    usual, undisturbed, expected = regression(None, 150, **changed)
    assert usual.metrics()["statistics_restarted"] == 0
    others = torch.ones(12, 10, dtype=torch.bool)
    others[3, 4] = False  # its second moment is infinite, in AdamW as well
    assert (weight - undisturbed)[others].abs().max() < 0.1 * undisturbed.abs().max()
    assert losses[-1] < 2 * expected[-1]


def largest_steps(zeros: int, beta: float, momentum: str, **changed: Any) -> tuple[float, float, Shampoo]:
    """The largest step of any element with gradients, and after so many steps without."""
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.zeros(8, 6))
    settings: dict[str, Any] = {
        "lr": 1e-3, "grafting": "none", "statistics_beta": beta, "momentum": momentum, "root_interval": 5,
        "root_overlap": False,
    }  # fmt: skip
    optimizer = Shampoo([weight], **{**settings, **changed})
    sizes = []
    for step in range(60 + zeros + 60):
        present = step < 60 or step >= 60 + zeros
        weight.grad = torch.randn(8, 6, generator=generator) * float(present)
        before = weight.detach().clone()
        optimizer.step()
        sizes.append(float((weight.detach() - before).abs().max()))
    return max(sizes[:60]), max(sizes[60:]), optimizer


@hypothesis_settings(deadline=None, max_examples=12)
@given(
    zeros=st.sampled_from([1, 7, 20, 40, 100, 200]),
    beta=st.sampled_from([0.5, 0.9, 0.99, 1.0]),
    momentum=st.sampled_from(["before", "after"]),
    changed=st.sampled_from(
        [{}, {"preconditioner": "spectral"}, {"preconditioner": "polar"}, {"root_refresh_threshold": 0.05}]
    ),
)
@example(zeros=20, beta=0.5, momentum="before", changed={})
@example(zeros=40, beta=0.5, momentum="before", changed={})
@example(zeros=100, beta=0.5, momentum="after", changed={})
@example(zeros=100, beta=0.5, momentum="before", changed={"root_refresh_threshold": 0.05})
@example(zeros=150, beta=0.5, momentum="before", changed={"root_refresh_threshold": 0.05})
@example(zeros=200, beta=0.5, momentum="before", changed={"root_refresh_threshold": 0.05})
@example(zeros=152, beta=0.5, momentum="after", changed={"root_refresh_threshold": 0.05})
def test_without_grafting_steps_stay_bounded_after_zero_gradients(
    zeros: int, beta: float, momentum: str, changed: dict[str, Any]
) -> None:
    before, after, optimizer = largest_steps(zeros, beta, momentum, **changed)
    assert after < 4 * before
    assert optimizer.metrics()["roots_skipped"] > 0 or zeros < 10


@pytest.mark.parametrize("momentum", ["before", "after"])
@pytest.mark.parametrize("zeros", [100, 148, 153, 200, 830, 1200])
def test_gradients_may_return_after_any_spell(zeros: int, momentum: str) -> None:
    """148 steps at b = 0.5 take a statistic to where it has no bits left, 830 at 0.9; a few more to where it stays."""
    beta = 0.5 if zeros < 500 else 0.9
    before, after, _ = largest_steps(zeros, beta, momentum, root_refresh_threshold=0.05)
    assert after < 4 * before


GRID: list[dict[str, Any]] = [
    {"root_refresh_threshold": 0.05},
    {"root_refresh_threshold": 0.05, "momentum": "after", "root_method": "newton"},
    {"root_refresh_threshold": 0.05, "preconditioner": "spectral", "root_interval": 7},
    {"root_refresh_threshold": 1.4, "grafting": "adam", "root_overlap": True},
    {"root_dtype": "bfloat16", "root_method": "newton"},
    {"root_dtype": "bfloat16", "preconditioner": "spectral", "momentum": "after"},
    {"statistics_interval": 3, "root_interval": 4, "root_delay": 2},
]


@pytest.mark.parametrize(
    ("changed", "beta"), [*((changed, 0.5) for changed in GRID), *((changed, 0.9) for changed in GRID[:3])]
)
def test_roots_keep_their_bits_while_statistics_decay_to_nothing(changed: dict[str, Any], beta: float) -> None:
    """Through numbers that fp32 has too few bits for, and over checkpoints on the way."""
    zeros, saved_at = (180, (133, 206, 208, 211)) if beta == 0.5 else (1100, (900, 1050))
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.zeros(8, 6))
    settings: dict[str, Any] = {
        "lr": 1e-3, "grafting": "none", "statistics_beta": beta, "root_interval": 5, "root_overlap": False,
        "root_threads": 1,
    }  # fmt: skip
    settings |= changed
    optimizer, kept = Shampoo([weight], **settings), []
    for step in range(60 + zeros):
        if step in saved_at:
            state = optimizer.state_dict()
            optimizer = Shampoo([weight], **settings)
            optimizer.load_state_dict(state)
        weight.grad = torch.randn(8, 6, generator=generator) * float(step < 60)
        optimizer.step()
        if step == 80:
            kept = roots(optimizer, weight)
        elif step > 80 and step % 3 == 0:
            assert all(map(torch.equal, kept, roots(optimizer, weight))), f"step {step}"
    assert optimizer.metrics()["preconditioned_blocks"] == 1


def roots(optimizer: Shampoo, weight: torch.Tensor) -> list[torch.Tensor]:
    return [root.clone() for root in optimizer.state[weight]["blocks"]["0"]["roots"].values()]


def test_roots_are_kept_over_a_checkpoint_within_a_spell_of_zeros() -> None:
    _, _, expected = largest_steps(30, 0.5, "before")
    generator = torch.Generator().manual_seed(1)
    weight = nn.Parameter(torch.zeros(8, 6))
    settings: dict[str, Any] = {"grafting": "none", "statistics_beta": 0.5, "root_interval": 5, "root_overlap": False}
    optimizer = Shampoo([weight], lr=1e-3, **settings)
    for step in range(150):
        if step in (63, 71, 88):
            state = optimizer.state_dict()
            optimizer = Shampoo([weight], lr=1e-3, **settings)
            optimizer.load_state_dict(state)
        weight.grad = torch.randn(8, 6, generator=generator) * float(step < 60 or step >= 90)
        optimizer.step()
    other = next(iter(expected.state))
    assert torch.equal(weight, other)


def job(
    diagonal: list[float], updates: int, former: Basis | None, beta: float = 0.5, threshold: float = 0.0
) -> RootJob:
    packed = torch.diag(torch.tensor(diagonal)).flatten()
    assert packed.numel() == packed_numel(len(diagonal))
    return RootJob(
        snapshot=HostCopy(packed), order=len(diagonal), correction=1.0, updates=updates, beta=beta, p=4, epsilon=1e-6,
        method="eigh", root_dtype=torch.float32, threshold=threshold, former=former,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("diagonal", "updates", "former", "verdict"),
    [
        ([1.0, 0.5], 5, Basis(48.0, 0), Verdict.ACCEPTED),  # of a checkpoint that does not know
        ([1.0, 0.5], 5, None, Verdict.ACCEPTED),
        ([1.0, 0.5], 10, Basis(48.0, 5), Verdict.KEPT),
        ([1.0, 0.50001], 10, Basis(48.0, 5), Verdict.KEPT),
        ([1.0, 0.501], 10, Basis(48.0, 5), Verdict.ACCEPTED),  # however small it is against the largest
        ([0.0, 0.0], 10, Basis(48.0, 5), Verdict.ZERO),
        ([1.0, 0.5], 4, Basis(48.0, 5), Verdict.ACCEPTED),
        ([1.0, float("inf")], 10, Basis(48.0, 5), Verdict.NOT_FINITE),
        ([1.0, float("nan")], 10, None, Verdict.NOT_FINITE),
    ],
)
def test_what_becomes_of_a_statistic(
    diagonal: list[float], updates: int, former: Basis | None, verdict: Verdict
) -> None:
    assert job(diagonal, updates, former).solve(Transfers(CPU)).verdict is verdict


@pytest.mark.parametrize("beta", [0.5, 0.95, 0.999])
def test_rounding_over_many_steps_is_no_gradient(beta: float) -> None:
    factor = torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.5
    trace, steps = float(factor.sum(dtype=torch.float64)), 0
    while float(factor.max()) > 1e-30 and steps < 20_000:
        factor.mul_(beta)
        steps += 1
        if steps % 50 == 0:
            answer = job(factor.tolist(), 100 + steps, Basis(trace, 100), beta).solve(Transfers(CPU))
            assert answer.verdict is Verdict.KEPT


@pytest.mark.parametrize("threshold", [0.0, 0.05])
@pytest.mark.parametrize("beta", [0.25, 0.5, 0.9, 0.999])
def test_rounding_where_fp32_runs_out_of_bits_is_no_gradient(beta: float, threshold: float) -> None:
    """One element far above many that fp32 will not let become zero: all of them together weigh more than it does."""
    factor = torch.full((128,), 2e-41)
    factor[0] = 3e-38
    former = Basis(float(factor.sum(dtype=torch.float64)), 100, torch.diag(factor))
    for steps in range(1, 3000):
        factor.mul_(beta)
        if steps % 7 == 0:
            verdict = job(factor.tolist(), 100 + steps, former, beta, threshold).solve(Transfers(CPU)).verdict
            assert verdict is (Verdict.KEPT if bool(factor.any()) else Verdict.ZERO), f"step {steps}"


@pytest.mark.parametrize("threshold", [0.0, 1.4])
def test_a_statistic_with_too_few_bits_is_as_good_as_none(threshold: float) -> None:
    """It comes of gradients that were never there: no root is computed or rescaled by it."""
    former = Basis(1e-60, 1, torch.eye(2))
    assert job([1e-39, 1e-39], 400, former, threshold=threshold).solve(Transfers(CPU)).verdict is Verdict.ZERO
