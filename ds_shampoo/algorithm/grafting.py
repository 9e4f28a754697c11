"""The elementwise half of a step: the gradient's filter, the grafting method's own step, and the update.

Everything works on flat fp32 tensors in place, in chunks that stay in a CPU core's cache; an accelerator takes
each tensor whole. Section 4 of docs/algorithm.md has the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Small enough for the arrays of a step to stay in a CPU's cache between passes, large enough to hide the cost of
# calling an operation; the best of 32K to 1024K by `benchmarks/step_time.py`, 8 per cent ahead of 32K.
_CPU_CHUNK = 256 * 1024


def is_normalized(grafting: str) -> bool:
    """Whether the grafting method divides its inputs by their norm, segment by segment."""
    return grafting.endswith("_normalized")


def average(value: Tensor, exp_avg: Tensor, out: Tensor, step: int, beta1: float, nesterov: bool) -> None:
    """`exp_avg` takes `value` in, and `out` becomes the unbiased (Nesterov) average of it.

    The value is the gradient with momentum "before", the grafted direction with momentum "after".

    Args:
        value, exp_avg, out: [numel] fp32; `out` may be `value`.
        step: the parameter's step count, 1 at its first step.
    """
    exp_avg.lerp_(value, 1 - beta1)
    if nesterov:
        torch.lerp(value, exp_avg, beta1, out=out).mul_(1 / (1 - beta1 ** (step + 1)))
    else:
        torch.mul(exp_avg, 1 / (1 - beta1**step), out=out)


def grafting_step(
    grafting: str,
    vector: Tensor,
    grad: Tensor,
    exp_avg_sq: Tensor,
    out: Tensor,
    step: int,
    beta2: float,
    eps: float,
) -> None:
    """Writes the grafting method's own step for `vector` into `out`, and takes `grad` into the second moment.

    Args:
        vector: [numel] fp32, the vector that is preconditioned; divided by its norm for a normalised method.
        grad: [numel] fp32, the raw gradient; divided by its norm likewise.
        exp_avg_sq: [numel] fp32, the second moment (a sum for adagrad).
        out: [numel] fp32, may be neither `vector` nor `grad`.
    """
    method = grafting.removesuffix("_normalized")
    if method in ("none", "sgd"):
        out.copy_(vector)
        return
    if method == "adagrad":
        exp_avg_sq.addcmul_(grad, grad)
    else:
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    correction = 1 / math.sqrt(1 - beta2**step) if method == "adam" else 1.0
    torch.sqrt(exp_avg_sq, out=out)
    torch.add(eps, out, alpha=correction, out=out)
    torch.div(vector, out, out=out)


def apply_update(param: Tensor, update: Tensor, lr: float, weight_decay: float) -> None:
    """θ <- θ - lr (u + weight_decay θ); `update` is spent.

    Args:
        param: of any float dtype and stride; rounded once.
        update: fp32, of the same shape.
    """
    if weight_decay:
        update.add_(param, alpha=weight_decay)
    param.add_(update, alpha=-lr)


def chunks(numel: int, device: torch.device) -> Iterator[slice]:
    """The slices in which a flat tensor is worked through."""
    size = _CPU_CHUNK if device.type == "cpu" else max(numel, 1)
    return (slice(at, at + size) for at in range(0, numel, size))
