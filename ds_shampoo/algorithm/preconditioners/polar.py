"""Whitened momentum with a flat spectrum."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.algorithm.orthogonal import flatten_spectrum
from ds_shampoo.algorithm.preconditioners.shampoo import ShampooPreconditioner


class PolarPreconditioner(ShampooPreconditioner):
    """Shampoo's direction with its outliers cut off: the polar factor of the whitened momentum, about.

    For a matrix polar(X_L V X_R) with roots of order 2.5: whitening goes on beyond Shampoo's order of 4, and few cubic
    steps bring the large singular values to one. A third fewer products than Muon: 2 for statistics, 2 to whiten and
    2 a step.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        device: torch.device,
        root_dtype: torch.dtype = torch.float32,
        differences: bool = False,
    ) -> None:
        super().__init__(blocks, device, root_dtype, differences)
        self.root_order = math.ceil(2.5 * len(self.factors)) / 2  # 2.5 for a matrix: each side's exponent is 0.4

    @property
    def directed(self) -> list[bool]:
        """All: without roots it is momentum's own spectrum that is made flat, as Muon does."""
        return [True] * len(self.blocks)

    def apply(self, vectors: Tensor, scratch: Tensor) -> Tensor:
        """The directions; a block of more than two dimensions is flattened as its first against the others."""
        flat, _ = self.apply_reshaped(vectors, scratch, flatten_spectrum)
        return flat
