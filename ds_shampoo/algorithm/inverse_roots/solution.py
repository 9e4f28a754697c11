"""What every root method takes and gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class NoRootError(Exception):
    """A method found no root that it can stand for; the message says why."""


@dataclass(frozen=True, slots=True)
class Solution:
    """A candidate root.

    Attributes:
        root: X, [n, n] fp64.
        ridge: what was added to the diagonal, absolute.
    """

    root: Tensor
    ridge: float


class Method(Protocol):
    """Computes (A + epsilon * lambda_max(A) * I)^(-1/p) for a symmetric fp64 matrix with max|A| = 1."""

    def __call__(self, matrix: Tensor, p: float, epsilon: float) -> Solution: ...


def checked_ridge(smallest: float, largest: float, epsilon: float) -> float:
    """The absolute ridge for a spectrum, if that spectrum can be a sum of G Gᵀ and the ridge outweighs its rounding.

    Rounding in fp32 statistics leaves eigenvalues of about -1e-7 of the largest. They are not clamped: the root
    must be that of the matrix which the probe multiplies by. Instead the ridge has to lift them to at least half
    of itself; where it doesn't, a larger one is tried.

    Raises:
        NoRootError: if the matrix is zero or clearly indefinite, or the ridge too small for its rounding.
    """
    if not largest > 0 or smallest < -1e-3 * largest:
        raise NoRootError(f"not positive semi-definite: eigenvalues from {smallest:.3g} to {largest:.3g}")
    ridge = epsilon * largest
    if smallest < -0.5 * ridge:
        raise NoRootError(f"the ridge {ridge:.3g} does not outweigh the eigenvalue {smallest:.3g}")
    return ridge
