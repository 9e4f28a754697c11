"""The inverse root by a full eigendecomposition: the fastest and most accurate method on a CPU core."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_shampoo.algorithm.inverse_roots.pieces import between_pieces
from ds_shampoo.algorithm.inverse_roots.solution import NoRootError, Solution, checked_ridge

# From this order on, what copying a quarter saves is worth the calls.
_QUARTER_FROM = 256


def solve(matrix: Tensor, p: float, epsilon: float) -> Solution:
    """X = V (Λ + ridge)^(-1/p) Vᵀ, built as a product of a matrix with its own transpose, hence SPD.

    Args:
        matrix: [n, n] fp64, symmetric, max|A| = 1.
        p: the root's order.
        epsilon: the ridge relative to the largest eigenvalue.

    Raises:
        NoRootError: where LAPACK fails or the matrix is not positive semi-definite up to the ridge.
    """
    between_pieces()
    try:
        eigenvalues, vectors = torch.linalg.eigh(matrix)
    except RuntimeError as error:  # torch.linalg.LinAlgError among them
        raise NoRootError(f"eigh failed: {error}") from error
    between_pieces()
    ridge = checked_ridge(float(eigenvalues[0]), float(eigenvalues[-1]), epsilon)
    vectors *= (eigenvalues + ridge).pow(-0.5 / p)
    return Solution(_gram(vectors), ridge)


def _gram(rows: Tensor) -> Tensor:
    """V Vᵀ of [n, n] fp64, exactly symmetric; the upper right quarter of a large one is copied, not computed."""
    order = rows.shape[0]
    if order < _QUARTER_FROM:
        return rows @ rows.mT
    half, gram = order // 2, torch.empty_like(rows, memory_format=torch.contiguous_format)
    torch.mm(rows, rows[:half].mT, out=gram[:, :half])
    between_pieces()
    torch.mm(rows[half:], rows[half:].mT, out=gram[half:, half:])
    gram[:half, half:] = gram[half:, :half].mT
    return gram
