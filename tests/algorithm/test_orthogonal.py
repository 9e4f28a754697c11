"""Newton-Schulz iteration: singular values near one, singular vectors kept."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ds_shampoo.algorithm import orthogonal
from ds_shampoo.algorithm.orthogonal import CUBIC_FROM, CUBICS, flatten_spectrum, minimax_cubics, orthogonalize


@pytest.mark.parametrize("shape", [(3, 6, 6), (2, 5, 160), (2, 160, 5), (1, 160, 160), (2, 7, 1)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-5
    u, s, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    found = torch.empty_like(matrices)
    orthogonalize(matrices.clone(), found)
    # In the basis of the singular vectors the result is diagonal.
    inner = u.mT @ found.double() @ vh.mT
    values = inner.diagonal(dim1=1, dim2=2)
    apart = inner - torch.diag_embed(values)
    assert apart.abs().max() < 1e-3
    large = s / torch.linalg.vector_norm(s, dim=1, keepdim=True) > 0.01
    assert large.any()
    assert values[large].min() > 0.68
    assert values.max() < 1.21
    assert torch.allclose(u @ inner @ vh, found.double(), atol=1e-4)


def spectrum(kind: str, count: int) -> torch.Tensor:
    """Singular values of a condition number of 100."""
    if kind == "even":
        return torch.logspace(0, -2, count)
    return torch.where(torch.arange(count) < count // 2, 1.0, 0.01)


@pytest.mark.parametrize("shape", [(2, 16, 64), (2, 64, 256), (2, 256, 64), (1, 160, 160)])
@pytest.mark.parametrize(("kind", "bound"), [("Gaussian", 0.03), ("even", 0.03), ("in two", 0.15)])
def test_an_iteration_in_bf16_stays_near(shape: tuple[int, int, int], kind: str, bound: float) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if kind != "Gaussian":
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
        matrices = (u * spectrum(kind, s.shape[1])) @ vh
    matrices = matrices.bfloat16().float()
    exact, rounded = torch.empty_like(matrices), torch.empty_like(matrices)
    orthogonalize(matrices.clone(), exact)
    orthogonalize(matrices.bfloat16(), rounded)
    assert 1e-4 < (exact - rounded).norm() / exact.norm() < bound


@pytest.mark.parametrize("shape", [(3, 6, 20), (3, 20, 6), (3, 9, 9)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("iterate", [orthogonal._quintics, orthogonal._cubics])
def test_a_stack_at_once_is_one_after_another(
    shape: tuple[int, int, int], dtype: torch.dtype, iterate: orthogonal._Iteration
) -> None:
    """CPUs take one matrix after another, accelerators all of a stack."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    together, apart = torch.empty_like(matrices), torch.empty_like(matrices)
    copy = matrices.to(dtype, copy=True)
    orthogonal._orthogonalize(copy.clone(), together, iterate)
    for i in range(len(matrices)):
        orthogonal._orthogonalize(copy[i : i + 1].clone(), apart[i : i + 1], iterate)
    assert torch.allclose(together, apart, atol=1e-6 if dtype == torch.float32 else 2**-6)


Method = Callable[[torch.Tensor, torch.Tensor], None]
both = pytest.mark.parametrize("method", [orthogonalize, flatten_spectrum])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 4, 9), (2, 9, 4)])
@both
def test_one_zero_matrix_of_a_stack_stays_zero(shape: tuple[int, int, int], method: Method, dtype: torch.dtype) -> None:
    matrices = torch.ones(shape, dtype=dtype)
    matrices[0] = 0
    found = torch.full(shape, 5.0)
    method(matrices, found)
    assert found[0].count_nonzero() == 0
    assert found[1].norm() > 0.5


@both
def test_scale_does_not_matter(method: Method) -> None:
    matrices = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1))
    one, tiny, huge = (torch.empty_like(matrices) for _ in range(3))
    method(matrices.clone(), one)
    method(matrices * 2.0**-50, tiny)
    method(matrices * 2.0**50, huge)
    assert torch.equal(one, tiny)
    assert torch.equal(one, huge)


def cubics_on(values: torch.Tensor) -> torch.Tensor:
    for linear, cubic in CUBICS:
        values = linear * values - cubic * values**3
    return values


@pytest.mark.parametrize("least", [0.01, 0.05, 0.3])
def test_every_cubic_errs_alike_at_three_places_by_turns(least: float) -> None:
    """Chebyshev's criterion: as many places as coefficients and one more, so no other odd cubic is nearer to one."""
    low, high = least, 1.0
    for linear, cubic in minimax_cubics(least, 4):
        grid = torch.linspace(low, high, 200_001, dtype=torch.float64)
        errors = linear * grid - cubic * grid**3 - 1
        worst = errors.abs().max()
        between = errors.argmax()
        assert 0 < between < len(grid) - 1
        assert [float(errors[at] / worst) for at in (0, int(between), -1)] == pytest.approx([-1, 1, -1], abs=1e-8)
        low, high = 1 - float(worst), 1 + float(worst)
    assert high - low < 1 - least


@pytest.mark.parametrize("kind", ["outlier", "even", "in two"])
@pytest.mark.parametrize("shape", [(2, 16, 64), (2, 64, 16), (1, 160, 160)])
def test_singular_values_are_flattened_and_vectors_stay(shape: tuple[int, int, int], kind: str) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = torch.full_like(s, 1e-4) if kind == "outlier" else spectrum(kind, s.shape[1]).expand_as(s).double()
    s[..., 0] = 1.0
    found = torch.empty(shape)
    flatten_spectrum(((u * s.unsqueeze(1)) @ vh).float(), found)
    parts = s / (s**4).sum(dim=1, keepdim=True) ** 0.25
    expected = (u * cubics_on(parts).unsqueeze(1)) @ vh
    assert (found - expected).abs().max() < 1e-5
    large = cubics_on(parts)[parts >= CUBIC_FROM]
    assert large.min() > 0.76
    assert large.max() < 1.24


@pytest.mark.parametrize("shape", [(2, 16, 64), (2, 64, 256), (2, 256, 64), (1, 160, 160)])
def test_cubics_in_bf16_stay_near(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    matrices = matrices.bfloat16().float()
    exact, rounded = torch.empty_like(matrices), torch.empty_like(matrices)
    flatten_spectrum(matrices.clone(), exact)
    flatten_spectrum(matrices.bfloat16(), rounded)
    assert 1e-4 < (exact - rounded).norm() / exact.norm() < 0.03
