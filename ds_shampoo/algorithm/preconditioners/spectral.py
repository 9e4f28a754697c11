"""Spectral descent in Shampoo's coordinates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.algorithm.orthogonal import orthogonalize
from ds_shampoo.algorithm.preconditioners.shampoo import ShampooPreconditioner


class SpectralPreconditioner(ShampooPreconditioner):
    """Spectral descent in Shampoo's coordinates: whitened halfway, made orthogonal, and taken back.

    For a matrix X_L msign(X_L V X_R) X_R, where msign(U S Vᵀ) = U Vᵀ: the steepest direction under a spectral norm that
    the statistics have bent (Zhang et al., "Mousse", arXiv 2603.09697; there with exponents of -1/8 too, and over
    whole matrices). A root applied twice has half of Shampoo's exponent.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        device: torch.device,
        root_dtype: torch.dtype = torch.float32,
        differences: bool = False,
    ) -> None:
        super().__init__(blocks, device, root_dtype, differences)
        self.root_order *= 2

    @property
    def directed(self) -> list[bool]:
        """All: without roots an orthogonal momentum, as Muon's."""
        return [True] * len(self.blocks)

    def apply(self, vectors: Tensor, scratch: Tensor) -> Tensor:
        """The directions; a block of more than two dimensions is orthogonal as its first against the others."""
        orthogonal, spare = self.apply_reshaped(vectors, scratch, orthogonalize)
        return super().apply(orthogonal, spare)
