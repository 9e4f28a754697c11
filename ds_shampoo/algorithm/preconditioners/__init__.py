"""Preconditioners: a stack of equal-shaped blocks at their owner, its state, and what it does to a gradient.

A new one is a file here, a line in `PRECONDITIONERS`, whose keys are what the setting "preconditioner" may say, and one
in `defaults.DEFAULTS`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch

from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.algorithm.preconditioners.polar import PolarPreconditioner
from ds_shampoo.algorithm.preconditioners.protocol import Preconditioner
from ds_shampoo.algorithm.preconditioners.shampoo import ShampooPreconditioner
from ds_shampoo.algorithm.preconditioners.spectral import SpectralPreconditioner

__all__ = [
    "PRECONDITIONERS",
    "PolarPreconditioner",
    "Preconditioner",
    "ShampooPreconditioner",
    "SpectralPreconditioner",
]

# From blocks of one shape, the device on which they are kept, the dtype of roots between steps, and whether statistics
# are of gradients' differences.
Build: TypeAlias = Callable[[Sequence[Block], torch.device, torch.dtype, bool], Preconditioner]

PRECONDITIONERS: Mapping[str, Build] = {
    "shampoo": ShampooPreconditioner,
    "spectral": SpectralPreconditioner,
    "polar": PolarPreconditioner,
}
