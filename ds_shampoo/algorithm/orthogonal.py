"""The nearest (semi-)orthogonal matrices, approximately: what spectral descent moves along."""

from __future__ import annotations

import torch
from torch import Tensor

from ds_shampoo.algorithm.products import multiply

# x <- A x + B x³ + C x⁵ takes every singular value from about 0.003 on into [0.68, 1.14] within five steps; the
# steepest odd quintic for that (K. Jordan, "Muon", 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 5


def orthogonalize(stacked: Tensor, out: Tensor) -> None:
    """out <- about U Vᵀ for every matrix U S Vᵀ of a stack, by Newton-Schulz iteration.

    Args:
        stacked: [n, rows, columns] fp32, contiguous, overwritten; a zero matrix gives zero.
        out: the same shape, contiguous, and not `stacked`.
    """
    if stacked.device.type != "cpu":
        _iterate(stacked, out)
        return
    for i in range(len(stacked)):  # one after another stays in the caches
        _iterate(stacked[i : i + 1], out[i : i + 1])


def _iterate(x: Tensor, out: Tensor) -> None:
    count, rows, columns = x.shape
    x.div_(torch.linalg.vector_norm(x.flatten(1), dim=1).clamp_(min=1e-30).view(-1, 1, 1))
    tall = rows > columns
    if tall:  # Gram matrices of the shorter side
        out.view(count, columns, rows).copy_(x.mT)
        x, out = out.view(count, columns, rows), x.view(count, columns, rows)
    order = min(rows, columns)
    gram, square = (x.new_empty(count, order, order) for _ in range(2))
    linear, cubic, quintic = QUINTIC
    for _ in range(STEPS):
        multiply(x, x.mT, gram)
        multiply(gram, gram, square)
        multiply(square.mul_(quintic).add_(gram, alpha=cubic), x, out)
        out.add_(x, alpha=linear)
        x, out = out, x
    if tall:
        out.view(count, rows, columns).copy_(x.mT)
