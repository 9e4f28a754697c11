"""What prototypes are made of: coefficients, polar factors, roots; all on stacks of matrices [n, rows, columns]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ds_shampoo.algorithm.orthogonal import QUINTIC, minimax_cubics


def polar(x: Tensor, method: str, count: int, floor: float) -> Tensor:
    """About U Vᵀ of every U S Vᵀ: "quintic", from the Frobenius norm, or "cubic", from Schatten's 4-norm."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    if method == "quintic":
        x = x / x.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1)
        a, b, c = QUINTIC
        for _ in range(count):
            gram = x @ x.mT
            x = a * x + (b * gram + c * gram @ gram) @ x
    else:
        gram = x @ x.mT
        scale = gram.flatten(1).norm(dim=1).clamp_min(1e-30).view(-1, 1, 1)
        x, gram = x / scale.sqrt(), gram / scale
        for number, (a, c) in enumerate(minimax_cubics(floor, count)):
            gram = x @ x.mT if number else gram
            x = a * x - c * gram @ x
    return x.mT if tall else x


def inverse_root(factors: Tensor, exponent: float, ridge: float) -> Tensor:
    """A^-exponent of every symmetric [n, d, d], with a ridge relative to the largest eigenvalue."""
    values, vectors = torch.linalg.eigh(factors.double())
    values = values.clamp_min(0) + ridge * values[:, -1:].clamp_min(1e-300)
    return ((vectors * values.pow(-exponent).unsqueeze(1)) @ vectors.mT).float()


def eigenbasis(factors: Tensor) -> Tensor:
    """The eigenvectors of every symmetric [n, d, d], as columns."""
    return torch.linalg.eigh(factors.double())[1].float()


def corrected_root(factors: Tensor, basis: Tensor, exponent: float, ridge: float, kind: str) -> Tensor:
    """About A^-exponent of every [n, d, d] in an older eigenbasis.

    "values" has the diagonal of A there for eigenvalues; "first_order" has what the rest changes too, as far as divided
    differences say.
    """
    rotated = basis.mT @ factors @ basis
    values = rotated.diagonal(dim1=1, dim2=2).clamp_min(0)
    values = values + ridge * values.amax(1, keepdim=True).clamp_min(1e-30)
    powers = values.pow(-exponent)
    if kind == "values":
        return (basis * powers.unsqueeze(1)) @ basis.mT
    gaps, rises = values.unsqueeze(2) - values.unsqueeze(1), powers.unsqueeze(2) - powers.unsqueeze(1)
    near = gaps.abs() <= 1e-4 * values.unsqueeze(2)
    slopes = torch.where(near, -exponent * powers.unsqueeze(2) / values.unsqueeze(2), rises / gaps)
    change = rotated * slopes
    change.diagonal(dim1=1, dim2=2).copy_(powers)
    return basis @ change @ basis.mT


def cosine(step: int, steps: int, warmup: int, floor: float) -> float:
    """The rate at a step that counts from 0, in parts of its peak."""
    if step < warmup:
        return (step + 1) / warmup
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
