"""The root of the diagonal alone: the last resort, which keeps a block preconditioned per row and column."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_shampoo.algorithm.inverse_roots.solution import NoRootError, Solution


def solve(matrix: Tensor, p: float, epsilon: float) -> Solution:
    """X = diag(A + ridge)^(-1/p) with the ridge relative to the largest diagonal element.

    Raises:
        NoRootError: if the diagonal is not finite or has a negative element.
    """
    diagonal = matrix.diagonal()
    if not bool(torch.isfinite(diagonal).all()) or float(diagonal.min()) < 0:
        raise NoRootError("the diagonal is negative or not finite")
    ridge = epsilon * float(diagonal.max())
    return Solution(torch.diag((diagonal + ridge).pow(-1.0 / p)), ridge)
