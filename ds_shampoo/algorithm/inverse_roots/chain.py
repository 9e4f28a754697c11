"""One inverse root with every safeguard: scaling, compression, a probe of the result, and a chain of fallbacks."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_shampoo.algorithm.inverse_roots import diagonal, eigh, newton
from ds_shampoo.algorithm.inverse_roots.pieces import between_pieces
from ds_shampoo.algorithm.inverse_roots.solution import Method, NoRootError, Solution

METHODS: Mapping[str, Method] = {"eigh": eigh.solve, "newton": newton.solve}

# A statistic below the smallest normal fp32 number is that of a gradient which was never there, or long ago: too few of
# its bits are left to tell directions, or a size.
ZERO_BELOW = torch.finfo(torch.float32).tiny
_PROBES = 4
_PROBE_TOLERANCE = 1e-6
_MAX_EPSILON = 1e-4


class Outcome(enum.Enum):
    """How the search for a root ended."""

    ACCEPTED = "accepted"  # by the method asked for
    FALLBACK = "fallback"  # by a later rung of the chain
    ZERO = "zero"  # the matrix is zero: there is nothing to precondition with
    REJECTED = "rejected"  # no rung gave a root that passes the probe


@dataclass(frozen=True, slots=True)
class InverseRoot:
    """The result of `inverse_root`.

    Attributes:
        outcome: how the search ended.
        root: [n, n] fp64 on the CPU, or None for ZERO and REJECTED.
        ridge: what was added to the diagonal, in the matrix's own scale.
        method: the rung that gave the root, or why there is none.
    """

    outcome: Outcome
    root: Tensor | None
    ridge: float
    method: str


def inverse_root(matrix: Tensor, p: float, epsilon: float, method: str = "eigh") -> InverseRoot:
    """(A + epsilon * lambda_max(A) * I)^(-1/p) of a symmetric positive semi-definite matrix.

    Args:
        matrix: [n, n] of any float dtype and device; not changed.
        p: the root's order, at least 1; a ratio of small whole numbers, such as 4 or 2.5.
        epsilon: the ridge relative to the largest eigenvalue.
        method: a key of `METHODS`.

    Never raises for a bad matrix: the outcome says what happened.
    """
    given = matrix.detach().to("cpu")
    scale = float(given.abs().max()) if given.numel() else 0.0
    if not scale < float("inf"):  # NaN compares false
        return InverseRoot(Outcome.REJECTED, None, 0.0, "the matrix is not finite")
    if scale < ZERO_BELOW:
        return InverseRoot(Outcome.ZERO, None, 0.0, "the matrix is zero")
    a = given.to(torch.float64)
    # Through a copy: torch transposes that in tiles, four times as fast as it adds a transposed view.
    b = torch.empty_like(a).copy_(a.mT).add_(a).mul_(0.5 / scale)
    used = b.diagonal() != 0
    if not bool(used.all()):
        used = b.abs().amax(dim=1) > 0
    compact = b if bool(used.all()) else b[used][:, used]
    reason = ""
    for rung, (name, solve, eps) in enumerate(_chain(method, epsilon)):
        between_pieces()
        try:
            solution = solve(compact, p, eps)
            between_pieces()
            if solve is not diagonal.solve:
                _probe(compact, p, solution)
        except NoRootError as rejection:
            reason = f"{name}: {rejection}"
            continue
        root = _expand(solution, used, p).mul_(scale ** (-1.0 / p))
        outcome = Outcome.ACCEPTED if rung == 0 else Outcome.FALLBACK
        return InverseRoot(outcome, root, solution.ridge * scale, name)
    return InverseRoot(Outcome.REJECTED, None, 0.0, reason)


def _chain(method: str, epsilon: float) -> Iterator[tuple[str, Method, float]]:
    """The rungs in their order: the method under a growing ridge, cold coupled Newton, the diagonal."""
    yield method, METHODS[method], epsilon
    ridge = 10 * epsilon
    while ridge <= _MAX_EPSILON * (1 + 1e-9):
        yield f"{method}, ridge {ridge:.0e}", METHODS[method], ridge
        ridge *= 10
    if method != "newton":
        yield "newton", newton.solve, epsilon
    yield "diagonal", diagonal.solve, epsilon


def _probe(matrix: Tensor, p: float, solution: Solution) -> None:
    """Checks Xᵃ (A + ridge I)ᵇ v = v, where p = a/b, on random vectors, the same ones for a given order.

    The factors come in such an order that their product is never far from I, since rounding grows with its condition.

    Raises:
        NoRootError: if the root is not finite or the relative error exceeds 1e-6.
    """
    generator = torch.Generator(device="cpu").manual_seed(matrix.shape[0])
    # As rows, which a product with a symmetric matrix takes twice as fast as columns.
    vectors = torch.randn(_PROBES, matrix.shape[0], dtype=matrix.dtype, device="cpu", generator=generator)
    image, (roots, matrices) = vectors, p.as_integer_ratio()
    taken_roots, taken = 0, 0
    while taken_roots < roots or taken < matrices:
        if taken * roots <= taken_roots * matrices:
            image, taken = torch.addmm(image, image, matrix, beta=solution.ridge), taken + 1
        else:
            image, taken_roots = image @ solution.root, taken_roots + 1
    error = float(((image - vectors).norm(dim=1) / vectors.norm(dim=1)).max())
    if not error <= _PROBE_TOLERANCE:
        raise NoRootError(f"the probe's relative error is {error:.3g}")


def _expand(solution: Solution, used: Tensor, p: float) -> Tensor:
    """Puts the rows that were left out back in: there A is zero, and the root is that of the ridge."""
    if bool(used.all()):
        return solution.root
    full = torch.diag(solution.root.new_full(used.shape, solution.ridge ** (-1.0 / p)))
    kept = used.nonzero().squeeze(1)
    full[kept[:, None], kept[None, :]] = solution.root
    return full
