"""The inverse root by a full eigendecomposition: the fastest and most accurate method on a CPU core."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_shampoo.algorithm.roots.solution import NoRootError, Solution, checked_ridge


def solve(matrix: Tensor, p: int, epsilon: float) -> Solution:
    """X = V (Λ + ridge)^(-1/p) Vᵀ, built as a product of a matrix with its own transpose, hence SPD.

    Args:
        matrix: [n, n] fp64, symmetric, max|A| = 1.
        p: the root's order.
        epsilon: the ridge relative to the largest eigenvalue.

    Raises:
        NoRootError: where LAPACK fails or the matrix is not positive semi-definite up to the ridge.
    """
    try:
        eigenvalues, vectors = torch.linalg.eigh(matrix)
    except RuntimeError as error:  # torch.linalg.LinAlgError among them
        raise NoRootError(f"eigh failed: {error}") from error
    ridge = checked_ridge(float(eigenvalues[0]), float(eigenvalues[-1]), epsilon)
    vectors *= (eigenvalues + ridge).pow(-0.5 / p)
    return Solution(vectors @ vectors.mT, ridge)
