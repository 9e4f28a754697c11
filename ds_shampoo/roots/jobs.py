"""One inverse root to compute on the host: what it is computed from, and what came of it."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ds_shampoo.algorithm.inverse_roots import ZERO_BELOW, Outcome, between_pieces, inverse_root
from ds_shampoo.algorithm.triangle import unpack
from ds_shampoo.roots.transfer import HostCopy, Transfers

# New gradients that add less than this to what is left of a statistic are as good as none.
_NEGLIGIBLE = 1e-4
# What rounding may add to a number at each product with b: a part of it, and below the normal ones up to a step.
_FP32 = torch.finfo(torch.float32)
_SUBNORMAL_STEP = _FP32.tiny * _FP32.eps


class Verdict(enum.Enum):
    """What came of a job."""

    ACCEPTED = "accepted"
    FALLBACK = "fallback"  # accepted from a later rung of the chain
    SKIPPED = "skipped"  # the statistic has hardly moved: the former root is rescaled
    KEPT = "kept"  # the statistic has done nothing but decay: the former root stays as it is
    ZERO = "zero"  # the statistic is as good as zero: there is nothing to compute a root from
    REJECTED = "rejected"  # no rung gave a root
    NOT_FINITE = "not finite"  # neither is there one, nor will there be from this statistic


_VERDICTS = {
    Outcome.ACCEPTED: Verdict.ACCEPTED,
    Outcome.FALLBACK: Verdict.FALLBACK,
    Outcome.ZERO: Verdict.ZERO,
    Outcome.REJECTED: Verdict.REJECTED,
}


@dataclass(frozen=True, slots=True)
class Basis:
    """What a root in force was computed from.

    Attributes:
        trace: of the uncorrected factor L, a sum of squared gradients.
        updates: how many L had taken in; 0 where that is not known.
        statistic: A, [d, d] fp32 on the CPU; kept where a job may be skipped since A has hardly moved.
    """

    trace: float = 0.0
    updates: int = 0
    statistic: Tensor | None = None


@dataclass(frozen=True, slots=True)
class RootAnswer:
    """What came of a `RootJob`.

    Attributes:
        verdict: how it ended.
        method: the rung that gave the root, or why there is none.
        root: X, [d, d] in a host buffer, of the dtype in which roots are kept; ACCEPTED and FALLBACK only.
        basis: what the root belongs to then; ACCEPTED, FALLBACK and SKIPPED only.
        scale: what the former root is multiplied by; SKIPPED only.
    """

    verdict: Verdict
    method: str = ""
    root: HostCopy | None = None
    basis: Basis | None = None
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class RootJob:
    """X = (A + epsilon lambda_max(A) I)^(-1/p) for one factor's statistic A, as of the step of the snapshot.

    Attributes:
        snapshot: the factor L, its packed lower triangle; A is it, unpacked, over `correction`.
        order: d.
        correction: the bias correction, 1 - b^n.
        updates: n; 0 where that is not known.
        beta: b.
        p, epsilon, method: of `inverse_root`.
        root_dtype: in which the root is kept.
        threshold: `root_refresh_threshold`; 0 never skips.
        former: the basis of the root in force; None where there is no root.
    """

    snapshot: HostCopy
    order: int
    correction: float
    updates: int
    beta: float
    p: float
    epsilon: float
    method: str
    root_dtype: torch.dtype
    threshold: float
    former: Basis | None

    def solve(self, transfers: Transfers) -> RootAnswer:
        """Runs the job on the calling thread; the same bits on any thread that is held to one core.

        Raises:
            StoppedError: where nobody waits for it any more.
        """
        matrix = unpack(self.snapshot.wait(), self.order)
        trace = float(matrix.diagonal().sum(dtype=torch.float64))
        matrix.div_(self.correction)
        between_pieces()
        largest = float(matrix.abs().max())
        if not largest < math.inf:  # NaN compares false
            return RootAnswer(Verdict.NOT_FINITE, "the statistic is not finite")
        if largest > 0 and self._only_decayed(trace):
            return RootAnswer(Verdict.KEPT)
        if largest < ZERO_BELOW:  # before anything is held against it, or rescaled by it
            return RootAnswer(Verdict.ZERO)
        before = None if self.former is None else self.former.statistic
        if before is not None and self.threshold > 0:
            moved, scale = relative_move(before, matrix)
            if moved < self.threshold:
                basis = Basis(trace, self.updates, before * scale)
                return RootAnswer(Verdict.SKIPPED, "", None, basis, float(scale ** (-1.0 / self.p)))
        found = inverse_root(matrix, self.p, self.epsilon, self.method)
        if found.root is None:
            return RootAnswer(_VERDICTS[found.outcome], found.method)
        if float(found.root.abs().max()) > torch.finfo(self.root_dtype).max:
            return RootAnswer(Verdict.REJECTED, f"the root overflows {self.root_dtype}")
        between_pieces()
        basis = Basis(trace, self.updates, matrix if self.threshold > 0 else None)
        root = transfers.result(found.root, self.root_dtype)
        return RootAnswer(_VERDICTS[found.outcome], found.method, root, basis)

    def _only_decayed(self, trace: float) -> bool:
        """Whether tr L <= bᵏ tr L₀ (1 + 1e-4), with L₀ the factor of the root in force and k updates since.

        L is bᵏ L₀ and a sum of G Gᵀ, whose trace is the sum of their squares: what is compared is all of the new
        gradients against all that is left of the old ones. That of b and of every product with it may be rounded up:
        by a part of itself, and where a diagonal element is below the normal numbers by a constant, of which 1 + b +
        b² + .. are there in the end. A b above 0.5 keeps such an element from ever becoming zero.
        """
        former = self.former
        if former is None or not 0 < former.updates <= self.updates:
            return False
        since = self.updates - former.updates
        rounding = since * _FP32.eps
        constants = since if self.beta == 1 else min(since, 1 / (1 - self.beta))
        left = self.beta**since * former.trace * (1 + _NEGLIGIBLE + rounding)
        return trace <= left + self.order * constants * _SUBNORMAL_STEP


def relative_move(former: Tensor, present: Tensor) -> tuple[float, float]:
    """How far a statistic moved, ‖A/‖A‖ - A₀/‖A₀‖‖_F, and its change of scale, ‖A‖/‖A₀‖; both in fp64.

    A statistic that is zero or not finite has moved infinitely far.
    """
    former, present = former.double(), present.double()
    norms = float(former.norm()), float(present.norm())
    if not all(0 < norm < math.inf for norm in norms):
        return math.inf, 1.0
    return float((present / norms[1] - former / norms[0]).norm()), norms[1] / norms[0]
