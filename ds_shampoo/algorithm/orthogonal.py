"""The nearest (semi-)orthogonal matrices, approximately: what spectral descent moves along."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ds_shampoo.algorithm.products import multiply, multiply_add

# x <- A x + B x³ + C x⁵ takes every singular value from about 0.003 on into [0.68, 1.21] within five steps; the
# steepest odd quintic for that (K. Jordan, "Muon", 2024).
QUINTIC = (3.4445, -4.7750, 2.0315)
STEPS = 5

# How many cubic steps bring a whitened matrix near orthogonal, and the least singular value that they are made for, in
# parts of the Schatten-4 norm. Smaller ones stay small: what a statistic hardly saw is mostly noise.
CUBIC_STEPS = 3
CUBIC_FROM = 0.05


def minimax_cubics(least: float, steps: int) -> Iterator[tuple[float, float]]:
    """The (a, c) of x <- a x - c x³, one after the other, that bring all of [least, 1] nearest to one.

    Each errs by as much at both ends of its interval, downwards, as between them, upwards: the best odd cubic for that
    interval by Chebyshev's theorem (Grishina, Smirnov and Rakhuba, "CANS", arXiv 2506.10935); what it makes of the
    interval is the next one's. Taken so, they are the best composition too (Amsel et al., "The Polar Express",
    arXiv 2505.16932).
    """
    low, high = least, 1.0
    for _ in range(steps):
        squares = low * low + low * high + high * high
        ends = low * high * (low + high)
        cubic = 2 / (ends + 2 * (squares / 3) ** 1.5)
        yield cubic * squares, cubic
        low, high = cubic * ends, 2 - cubic * ends


CUBICS = tuple(minimax_cubics(CUBIC_FROM, CUBIC_STEPS))

# From [n, rows, columns] of no more rows than columns, and such a spare one, to the result in one of the two.
_Iteration = Callable[[Tensor, Tensor], Tensor]


def orthogonalize(stacked: Tensor, out: Tensor) -> None:
    """out <- about U Vᵀ for every matrix U S Vᵀ of a stack, by Newton-Schulz iteration.

    Args:
        stacked: [n, rows, columns], contiguous, overwritten; a zero matrix gives zero. Its dtype is that of the
            iteration: fp32, or bfloat16 as Muon's, which is twice as fast where a device multiplies in that, and off
            by 1 to 3 per cent for usual spectra, by up to 15 where half of the singular values are a hundredth of the
            others.
        out: the same shape, fp32, contiguous, and of other memory.
    """
    _each(stacked, out, _quintics)


def flatten_spectrum(stacked: Tensor, out: Tensor) -> None:
    """out <- U f(S) Vᵀ for every matrix U S Vᵀ of a stack, by few cubic steps: f is near one where S is large.

    S in parts of the Schatten-4 norm, (sum s⁴)^(1/4): from `CUBIC_FROM` on it comes between 0.77 and 1.23, and what is
    smaller is 15 to 17 times as large as it was. Arguments are as of `orthogonalize`.
    """
    _each(stacked, out, _cubics)


def _each(stacked: Tensor, out: Tensor, iterate: _Iteration) -> None:
    if stacked.device.type != "cpu":
        _orthogonalize(stacked, out, iterate)
        return
    for i in range(len(stacked)):  # one after another stays in the caches
        _orthogonalize(stacked[i : i + 1], out[i : i + 1], iterate)


def _orthogonalize(x: Tensor, out: Tensor, iterate: _Iteration) -> None:
    count, rows, columns = x.shape
    norms = torch.linalg.vector_norm(x.flatten(1), dim=1, dtype=torch.float32)
    x.div_(norms.clamp_(min=1e-30).view(-1, 1, 1))
    start, spare = x, out
    if rows > columns or out.dtype != x.dtype:
        # Gram matrices are of the shorter side; and what a narrow iteration ends in is not the memory of `out`.
        shape = (count, min(rows, columns), max(rows, columns))
        start, spare = out.view(-1).view(x.dtype)[: x.numel()].view(shape), x.view(shape)
        start.copy_(x.mT if rows > columns else x)
    found = iterate(start, spare)
    if found is start and start is not x:
        found = found.clone()
    if found is not out:
        out.copy_(found.mT if rows > columns else found)


def _quintics(x: Tensor, spare: Tensor) -> Tensor:
    """The quintic, applied five times."""
    count, order = x.shape[:2]
    gram, polynomial = (x.new_empty(count, order, order) for _ in range(2))
    linear, cubic, quintic = QUINTIC
    for _ in range(STEPS):
        multiply(x, x.mT, gram)
        multiply_add(gram, gram, gram, alpha=quintic, beta=cubic, out=polynomial)
        multiply_add(polynomial, x, x, alpha=1.0, beta=linear, out=spare)
        x, spare = spare, x
    return x


def _cubics(x: Tensor, spare: Tensor) -> Tensor:
    """The cubics one after the other, from singular values in parts of their Schatten-4 norm on."""
    count, order = x.shape[:2]
    gram = x.new_empty(count, order, order)
    for step, (linear, cubic) in enumerate(CUBICS):
        multiply(x, x.mT, gram)
        if step == 0:  # the first Gram matrix gives the norm: (sum s⁴)^(1/2) is its Frobenius norm
            square = torch.linalg.vector_norm(gram.flatten(1), dim=1, dtype=torch.float32)
            square = square.clamp_(min=1e-30).view(-1, 1, 1)
            gram.div_(square)
            x.div_(square.sqrt())
        multiply_add(gram, x, x, alpha=-cubic, beta=linear, out=spare)
        x, spare = spare, x
    return x
