"""The step's stacked matrix products: torch's batched ones, or oneDNN's fp32 kernels where those are faster."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ds_shampoo.algorithm.precision import in_force
from ds_shampoo.algorithm.triangle import views

# Below so many multiplications a product is over before oneDNN's call has paid: even at order 96 to 128.
_WORTH_ONEDNN = 128**3

# left [m, k] and right [l, k], both contiguous, or `right` the transpose of a contiguous tensor: left rightᵀ, new.
Multiply = Callable[[Tensor, Tensor], Tensor]


def multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """out <- left right, for stacks [n, m, k] and [n, k, l] in fp32 or bfloat16; `out` is neither of them.

    All are contiguous, but `right` may be the transpose (`mT`) of a contiguous stack.
    """
    onednn = _onednn_for(left, right.shape[2])
    if onednn is None or in_force() == "medium":  # for which torch itself calls oneDNN, and saves the copy
        torch.bmm(left, right, out=out)
        return
    for product, a, b in zip(out, left, right, strict=True):
        product.copy_(onednn(a, b.mT))


def multiply_add(left: Tensor, right: Tensor, addend: Tensor, *, alpha: float, beta: float, out: Tensor) -> None:
    """out <- alpha left right + beta addend, of stacks as `multiply` takes them, in fp32 or bfloat16.

    `addend` is contiguous, of the result's shape, and may be one of the factors; `out` is none of the three.
    """
    onednn = _onednn_for(left, right.shape[2])
    if onednn is None:
        torch.baddbmm(addend, left, right, beta=beta, alpha=alpha, out=out)
        return
    for result, own, a, b in zip(out, addend, left, right, strict=True):
        torch.add(onednn(a, b.mT).mul_(alpha), own, alpha=beta, out=result)


def accumulate_gram(target: Tensor, rows: Tensor, beta: float) -> None:
    """target <- beta target + w rows rowsᵀ.

    Args:
        target: [n, packed_numel(d)] fp32, packed lower triangles.
        rows: [n, d, m] fp32, of any strides.
        beta: w is 1 - beta, or 1 for a beta of 1.
    """
    order = rows.shape[1]
    onednn = _onednn_for(rows, order)
    if onednn is None:
        weight = 1 - beta if beta < 1 else 1.0
        for panel, part in views(target, order):
            right = rows[:, panel.start : panel.start + panel.width].mT
            torch.baddbmm(part, rows[:, panel.start :], right, beta=beta, alpha=weight, out=part)
        return
    for packed, own in zip(target, rows, strict=True):
        dense = own.contiguous()
        for panel, part in views(packed, order):
            right = dense[panel.start : panel.start + panel.width]
            _take_in(part, onednn(dense[panel.start :], right), beta)


def _take_in(part: Tensor, product: Tensor, beta: float) -> None:
    if beta < 1:
        part.lerp_(product, 1 - beta)
    else:
        part.add_(product)


def describe(device: torch.device) -> str:
    """One line for the table at start."""
    return f"products: by {'oneDNN' if device.type == 'cpu' and onednn_product() else 'torch'} on {device.type}"


def _onednn_for(left: Tensor, columns: int) -> Multiply | None:
    """oneDNN's product, where it is worth its call for left [n, m, k] and so many columns of the result."""
    if left.device.type != "cpu" or left.dtype != torch.float32:
        return None
    if left.shape[1] * left.shape[2] * columns < _WORTH_ONEDNN:
        return None
    return onednn_product()


@functools.cache
def onednn_product() -> Multiply | None:
    """oneDNN's fp32 product on processors with AVX-512, where it can be called and passes a trial.

    torch's own fp32 products are MKL's, which keeps to AVX2 on AMD's processors: half the rate. torch has no
    public way to ask for oneDNN's in plain fp32; this operator is the one that TorchInductor calls.
    """
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return None
    try:
        linear = torch.ops.mkldnn._linear_pointwise.default

        def product(left: Tensor, right: Tensor) -> Tensor:
            found: Tensor = linear(left, right, None, "none", [], "")
            return found

        left = torch.linspace(-1, 2, 48, dtype=torch.float32, device="cpu").view(6, 8)
        right = torch.linspace(0.5, 3, 40, dtype=torch.float32, device="cpu").view(8, 5)
        trials = product(left, right.mT), product(left, right.mT.contiguous())
        if not all(torch.allclose(trial.double(), left.double() @ right.double()) for trial in trials):
            return None
    except Exception:  # another signature, or a torch built without oneDNN
        return None
    return product
