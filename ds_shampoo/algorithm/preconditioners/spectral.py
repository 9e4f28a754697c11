"""Spectral descent in Shampoo's coordinates."""

from __future__ import annotations

from torch import Tensor

from ds_shampoo.algorithm.orthogonal import orthogonalize
from ds_shampoo.algorithm.preconditioners.shampoo import ShampooPreconditioner


class SpectralPreconditioner(ShampooPreconditioner):
    """Spectral descent in Shampoo's coordinates: whitened halfway, made orthogonal, and taken back.

    For a matrix X_L msign(X_L V X_R) X_R, where msign(U S Vᵀ) = U Vᵀ: the steepest direction under a spectral norm that
    the statistics have bent (Zhang et al., "Mousse", arXiv 2603.09697; there with exponents of -1/8 too, and over
    whole matrices). A root applied twice has half of Shampoo's exponent.
    """

    needs_roots = False  # without them it is an orthogonal momentum, as Muon's

    @property
    def root_order(self) -> float:
        return 2 * super().root_order

    def apply(self, vectors: Tensor, scratch: Tensor) -> Tensor:
        """The directions; a block of more than two dimensions is orthogonal as its first against the others."""
        orthogonal, spare = self.apply_reshaped(vectors, scratch, orthogonalize)
        return super().apply(orthogonal, spare)
