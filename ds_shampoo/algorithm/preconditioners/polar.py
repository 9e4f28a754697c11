"""Whitened momentum with a flat spectrum."""

from __future__ import annotations

import math

from torch import Tensor

from ds_shampoo.algorithm.orthogonal import flatten_spectrum
from ds_shampoo.algorithm.preconditioners.shampoo import ShampooPreconditioner


class PolarPreconditioner(ShampooPreconditioner):
    """Shampoo's direction with its outliers cut off: the polar factor of the whitened momentum, about.

    For a matrix polar(X_L V X_R) with roots of order 2.5: whitening goes on beyond Shampoo's order of 4, and few cubic
    steps bring the large singular values to one. A third fewer products than Muon: 2 for statistics, 2 to whiten and
    2 a step.
    """

    needs_roots = False  # without them it is momentum's own spectrum that is made flat, as Muon does

    @property
    def root_order(self) -> float:
        return math.ceil(2.5 * len(self.factors)) / 2  # 2.5 for a matrix: each side's exponent is 0.4

    def apply(self, vectors: Tensor, scratch: Tensor) -> Tensor:
        """The directions; a block of more than two dimensions is flattened as its first against the others."""
        flat, _ = self.apply_reshaped(vectors, scratch, flatten_spectrum)
        return flat
