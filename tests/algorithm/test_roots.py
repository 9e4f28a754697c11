"""Inverse roots: they are roots over every size, rank, scale and condition, and no bad matrix gets through."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_shampoo.algorithm.inverse_roots import METHODS, Outcome, chain, inverse_root
from ds_shampoo.algorithm.inverse_roots.solution import Solution


def spd(n: int, rank: int, log_condition: float, scale: float, seed: int) -> torch.Tensor:
    """A symmetric matrix with `rank` eigenvalues spread over the condition number, the others zero."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0][:, :rank]
    eigenvalues = torch.logspace(0, -log_condition, rank, dtype=torch.float64)
    matrix = (basis * eigenvalues) @ basis.mT
    return 0.5 * (matrix + matrix.mT) * scale


def error(matrix: torch.Tensor, root: torch.Tensor, ridge: float, p: float) -> float:
    """max |Xᵃ (A + ridge I)ᵇ - I| for p = a/b, computed at scale 1."""
    scale, (roots, matrices) = float(matrix.abs().max()), p.as_integer_ratio()
    x = root * scale ** (1 / p)
    identity = torch.eye(len(matrix), dtype=torch.float64)
    a = matrix / scale + ridge / scale * identity
    if matrices == 1:
        return float((torch.linalg.matrix_power(x, roots) @ a - identity).abs().max())
    # A power of A would lose the small eigenvalues; each X takes an equal part of it, half on either side.
    values, vectors = torch.linalg.eigh(a)
    part = vectors * values.pow(0.5 / p) @ vectors.mT
    return float((torch.linalg.matrix_power(part @ x @ part, roots) - identity).abs().max())


@pytest.mark.parametrize("method", sorted(METHODS))
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_roots_are_roots(method: str, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 300 if method == "eigh" else 96), "n")
    rank = data.draw(st.integers(1, n), "rank")
    p = data.draw(st.sampled_from([1, 2, 3, 4, 6, 1.5, 2.5]), "p")
    condition = data.draw(st.floats(0, 12), "log10 condition")
    scale = 10.0 ** data.draw(st.floats(-30, 20), "log10 scale")
    matrix = spd(n, rank, condition, scale, data.draw(st.integers(0, 1000), "seed"))
    result = inverse_root(matrix, p, 1e-6, method)
    assert result.outcome is Outcome.ACCEPTED
    assert result.root is not None
    assert result.ridge == pytest.approx(1e-6 * float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-6)
    assert torch.equal(result.root, result.root.mT) or (result.root - result.root.mT).abs().max() < 1e-12 * (
        result.root.abs().max()
    )
    assert error(matrix, result.root, result.ridge, p) <= 1e-8


@settings(max_examples=20, deadline=None)
@given(n=st.integers(2, 120), seed=st.integers(0, 99), p=st.sampled_from([2, 4, 2.5]))
def test_the_methods_agree(n: int, seed: int, p: float) -> None:
    matrix = spd(n, max(1, n // 2), 8.0, 3.0, seed)
    by_eigh, by_newton = (inverse_root(matrix, p, 1e-6, method).root for method in ("eigh", "newton"))
    assert by_eigh is not None
    assert by_newton is not None
    assert (by_eigh - by_newton).norm() <= 1e-8 * by_eigh.norm()


@settings(max_examples=20, deadline=None)
@given(n=st.integers(4, 80), seed=st.integers(0, 99))
def test_rows_that_were_never_used_are_left_out_without_changing_the_root(n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    used = torch.randperm(n, generator=generator)[: max(1, n // 3)]
    matrix = torch.zeros(n, n, dtype=torch.float64)
    matrix[used[:, None], used[None, :]] = spd(len(used), len(used), 3.0, 1.0, seed)
    result = inverse_root(matrix, 4, 1e-6)
    assert result.root is not None
    assert error(matrix, result.root, result.ridge, 4) <= 1e-8
    unused = [i for i in range(n) if i not in set(used.tolist())]
    assert torch.allclose(
        result.root.diagonal()[unused], torch.full((len(unused),), result.ridge**-0.25, dtype=torch.float64)
    )


def test_fp32_rounding_of_a_rank_deficient_statistic_needs_no_fallback() -> None:
    generator = torch.Generator().manual_seed(0)
    for n in (8, 64, 256):
        grad = torch.randn(n, max(1, n // 4), generator=generator)
        result = inverse_root(grad @ grad.mT, 4, 1e-6)
        assert result.outcome is Outcome.ACCEPTED, result.method


def test_a_small_asymmetry_is_averaged_out() -> None:
    matrix = spd(40, 40, 5.0, 1.0, 0)
    noise = 1e-7 * torch.randn(40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    skewed = inverse_root(matrix + (noise - noise.mT), 4, 1e-6).root
    clean = inverse_root(matrix, 4, 1e-6).root
    assert skewed is not None
    assert clean is not None
    assert (skewed - clean).norm() <= 1e-8 * clean.norm()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_matrix_that_is_not_finite_has_no_root(value: float, method: str) -> None:
    matrix = spd(12, 12, 2.0, 1.0, 0)
    matrix[3, 4] = value
    result = inverse_root(matrix, 4, 1e-6, method)
    assert result.outcome is Outcome.REJECTED
    assert result.root is None
    assert "not finite" in result.method


@pytest.mark.parametrize("scale", [0.0, 1e-40])
def test_a_zero_matrix_asks_for_nothing(scale: float) -> None:
    result = inverse_root(torch.eye(5, dtype=torch.float64) * scale, 4, 1e-6)
    assert result.outcome is Outcome.ZERO
    assert result.root is None


@pytest.mark.parametrize("method", sorted(METHODS))
def test_an_indefinite_matrix_ends_at_its_diagonal(method: str) -> None:
    matrix = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    result = inverse_root(matrix, 2, 1e-6, method)
    assert result.outcome is Outcome.FALLBACK
    assert result.method == "diagonal"
    assert result.root is not None
    assert torch.allclose(result.root, torch.eye(2, dtype=torch.float64), atol=1e-5)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_negative_diagonal_is_rejected(method: str) -> None:
    result = inverse_root(torch.diag(torch.tensor([1.0, -0.5])), 2, 1e-6, method)
    assert result.outcome is Outcome.REJECTED
    assert result.root is None


def test_a_ridge_below_the_rounding_is_raised() -> None:
    matrix = torch.diag(torch.tensor([1.0, -1e-9], dtype=torch.float64))
    result = inverse_root(matrix, 4, 1e-10)
    assert result.outcome is Outcome.FALLBACK
    assert result.method == "eigh, ridge 1e-08"
    assert result.ridge == pytest.approx(1e-8)


def test_a_wrong_answer_does_not_pass_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(matrix: torch.Tensor, p: int, epsilon: float) -> Solution:
        return Solution(torch.eye(len(matrix), dtype=matrix.dtype), epsilon)

    monkeypatch.setattr(chain, "METHODS", {**METHODS, "eigh": wrong})
    result = inverse_root(spd(16, 16, 2.0, 1.0, 0), 4, 1e-6, "eigh")
    assert result.outcome is Outcome.FALLBACK
    assert result.method == "newton"


def test_a_failing_lapack_falls_back_to_newton(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    matrix = spd(24, 24, 3.0, 5.0, 0)
    expected = inverse_root(matrix, 4, 1e-6).root
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    monkeypatch.setattr(torch.linalg, "eigvalsh", failing)
    result = inverse_root(matrix, 4, 1e-6)
    assert result.outcome is Outcome.FALLBACK
    assert result.method == "newton"
    assert result.root is not None
    assert expected is not None
    assert (result.root - expected).norm() <= 1e-6 * expected.norm()


def test_the_input_is_left_alone_and_results_repeat_bit_for_bit() -> None:
    matrix = spd(50, 20, 6.0, 1e-8, 3)
    before = matrix.clone()
    first, second = inverse_root(matrix, 4, 1e-6).root, inverse_root(matrix, 4, 1e-6).root
    assert torch.equal(matrix, before)
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
