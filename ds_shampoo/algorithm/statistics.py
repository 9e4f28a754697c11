"""Kronecker-factor statistics of stacked blocks: L <- b L + w G Gᵀ for every mode (paper, Algorithm 1)."""

from __future__ import annotations

from torch import Tensor

from ds_shampoo.algorithm.products import accumulate_gram


def matricize(grad: Tensor, dim: int) -> Tensor:
    """Unfolds stacked blocks [n, d_0, .., d_k] along `dim`: [n, d_dim, the product of the others]."""
    return grad.movedim(dim + 1, 1).flatten(2)


def accumulate(factor: Tensor, grad: Tensor, dim: int, beta: float) -> None:
    """Updates one factor of stacked blocks in place.

    Args:
        factor: [n, packed_numel(d)] fp32, packed lower triangles; see `triangle`.
        grad: [n, d_0, .., d_k] fp32 block gradients.
        dim: the block dimension that the factor belongs to; d = d_dim.
        beta: decay b; the new term's weight is 1 - b, or 1 for b = 1 (the AdaGrad sum).
    """
    accumulate_gram(factor, matricize(grad, dim), beta)


def bias_correction(beta: float, updates: int) -> float:
    """What a factor is divided by after `updates` updates from zero: 1 - b^n, or 1 for the sum."""
    return 1.0 - beta**updates if beta < 1 else 1.0
