"""One inverse root to compute on the host: what it is computed from, and what came of it."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_shampoo.algorithm.roots import Outcome, inverse_root
from ds_shampoo.algorithm.triangle import unpack
from ds_shampoo.host.transfer import HostCopy, Transfers


class Verdict(enum.Enum):
    """What came of a job."""

    ACCEPTED = "accepted"
    FALLBACK = "fallback"  # accepted from a later rung of the chain
    SKIPPED = "skipped"  # the statistic has hardly moved: the former root is rescaled
    ZERO = "zero"  # the statistic is zero: there is nothing to precondition with yet
    REJECTED = "rejected"  # no rung gave a root


_VERDICTS = {
    Outcome.ACCEPTED: Verdict.ACCEPTED,
    Outcome.FALLBACK: Verdict.FALLBACK,
    Outcome.ZERO: Verdict.ZERO,
    Outcome.REJECTED: Verdict.REJECTED,
}


@dataclass(frozen=True, slots=True)
class RootAnswer:
    """What came of a `RootJob`.

    Attributes:
        verdict: how it ended.
        method: the rung that gave the root, or why there is none.
        root: X, [d, d] in a host buffer, of the dtype in which roots are kept; ACCEPTED and FALLBACK only.
        statistic: the A that the root belongs to, kept where the next job may be skipped: [d, d] fp32.
        scale: what the former root is multiplied by; SKIPPED only.
    """

    verdict: Verdict
    method: str = ""
    root: HostCopy | None = None
    statistic: Tensor | None = None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class RootJob:
    """X = (A + epsilon lambda_max(A) I)^(-1/p) for one factor's statistic A, as of the step of the snapshot.

    Attributes:
        snapshot: the factor's packed lower triangle; A is it, unpacked, over `correction`.
        order: d.
        correction: the bias correction, 1 - b^n.
        p, epsilon, method: of `inverse_root`.
        root_dtype: in which the root is kept.
        threshold: `root_refresh_threshold`; 0 never skips.
        former: the statistic of the root in force, [d, d] fp32; None where nothing may be skipped.
    """

    snapshot: HostCopy
    order: int
    correction: float
    p: int
    epsilon: float
    method: str
    root_dtype: torch.dtype
    threshold: float
    former: Tensor | None

    def solve(self, transfers: Transfers) -> RootAnswer:
        """Runs the job on the calling thread; the same bits on any thread that is held to one core."""
        matrix = unpack(self.snapshot.wait(), self.order).div_(self.correction)
        if self.former is not None:
            moved, scale = relative_move(self.former, matrix)
            if moved < self.threshold:
                return RootAnswer(Verdict.SKIPPED, "", None, self.former * scale, float(scale ** (-1.0 / self.p)))
        found = inverse_root(matrix, self.p, self.epsilon, self.method)
        if found.root is not None and float(found.root.abs().max()) > torch.finfo(self.root_dtype).max:
            return RootAnswer(Verdict.REJECTED, f"the root overflows {self.root_dtype}")
        root = None if found.root is None else transfers.result(found.root, self.root_dtype)
        kept = matrix if self.threshold > 0 and root is not None else None
        return RootAnswer(_VERDICTS[found.outcome], found.method, root, kept)


def relative_move(former: Tensor, present: Tensor) -> tuple[float, float]:
    """How far a statistic moved, ‖A/‖A‖ - A₀/‖A₀‖‖_F, and its change of scale, ‖A‖/‖A₀‖; both in fp64.

    A statistic that is zero or not finite has moved infinitely far.
    """
    former, present = former.double(), present.double()
    norms = float(former.norm()), float(present.norm())
    if not all(0 < norm < math.inf for norm in norms):
        return math.inf, 1.0
    return float((present / norms[1] - former / norms[0]).norm()), norms[1] / norms[0]
