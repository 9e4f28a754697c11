"""The inverse root by the coupled Newton iteration in fp64, always from a cold start.

A warm start would not commute with the new matrix: the iteration then reports convergence far from the root.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ds_shampoo.algorithm.inverse_roots.pieces import between_pieces
from ds_shampoo.algorithm.inverse_roots.solution import NoRootError, Solution, checked_ridge

_MAX_ITERATIONS = 200
_TOLERANCE = 1e-13
_POWER_ITERATIONS = 200


def solve(matrix: Tensor, p: float, epsilon: float) -> Solution:
    """Iannazzo's coupled iteration: M -> I while H -> A^(-1/p) (the method of the paper, section 4 and appendix).

    A root of order a/b is the b-th power of that of order a.

    Args:
        matrix: [n, n] fp64, symmetric, max|A| = 1.
        p: the root's order.
        epsilon: the ridge relative to the largest eigenvalue.

    Raises:
        NoRootError: where the matrix is not positive semi-definite or the iteration diverges.
    """
    between_pieces()
    smallest, largest = _spectrum_ends(matrix)
    ridge = checked_ridge(smallest, largest, epsilon)
    order, power = p.as_integer_ratio()
    identity = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    scale = (1 + order) / (2 * (largest + ridge))
    coupled = (matrix + ridge * identity) * scale
    root = identity * scale ** (1 / order)
    best_root, best_error = root, float("inf")
    for _ in range(_MAX_ITERATIONS):
        between_pieces()
        error = float((coupled - identity).abs().max())
        if error < best_error:
            best_root, best_error = root, error
        if error < _TOLERANCE or not error < 2 * best_error + 1:
            break
        factor = ((order + 1) * identity - coupled) / order
        root = root @ factor
        between_pieces()
        coupled = torch.linalg.matrix_power(factor, order) @ coupled
        coupled = 0.5 * (coupled + coupled.mT)
    if not best_error < 1:
        raise NoRootError(f"coupled Newton diverged: max|M - I| = {best_error:.3g}")
    found = torch.linalg.matrix_power(0.5 * (best_root + best_root.mT), power)
    return Solution(0.5 * (found + found.mT), ridge)


def _spectrum_ends(matrix: Tensor) -> tuple[float, float]:
    """The smallest and largest eigenvalue; without LAPACK's help the largest alone, by power iteration."""
    try:
        eigenvalues = torch.linalg.eigvalsh(matrix)
        return float(eigenvalues[0]), float(eigenvalues[-1])
    except RuntimeError:  # torch.linalg.LinAlgError among them
        vector = torch.ones(matrix.shape[0], 1, dtype=matrix.dtype, device=matrix.device)
        for _ in range(_POWER_ITERATIONS):
            image = matrix @ vector
            vector = image / image.norm().clamp(min=torch.finfo(image.dtype).tiny)
        return 0.0, float((vector.mT @ matrix @ vector).squeeze())
