"""The elementwise half of a step: the gradient's filter and the grafting method's own step.

Both work in place on lists of flat fp32 tensors, one for each of several parameters or parts of them.
Section 4 of docs/algorithm.md has the formulas.
"""

from __future__ import annotations

import math

import torch

from ds_shampoo.algorithm.momentum import MomentumSchedule
from ds_shampoo.algorithm.multi_tensor import Tensors, TorchKernels


def is_normalized(grafting: str) -> bool:
    """Whether the grafting method divides its inputs by their norm, segment by segment."""
    return grafting.endswith("_normalized")


def average(
    kernels: TorchKernels,
    values: Tensors,
    exp_avgs: Tensors,
    outs: Tensors,
    *,
    step: int,
    schedule: MomentumSchedule,
    nesterov: bool,
) -> None:
    """`exp_avgs` take `values` in, and `outs` become their unbiased (Nesterov) averages.

    The values are the gradients with momentum "before", the grafted directions with momentum "after".

    Args:
        values, exp_avgs, outs: [numel] fp32 each; `outs` may be `values`.
        step: the parameters' step count, 1 at their first step.
        schedule: of the average's decay.
    """
    kernels.lerp(exp_avgs, values, exp_avgs, weight=1 - schedule.at(step))
    if nesterov:
        kernels.lerp(values, exp_avgs, outs, weight=schedule.at(step + 1), factor=1 / (1 - schedule.product(step + 1)))
    else:
        kernels.scale(exp_avgs, 1 / (1 - schedule.product(step)), outs)


def grafting_step(
    kernels: TorchKernels,
    grafting: str,
    *,
    vectors: Tensors,
    grads: Tensors,
    exp_avg_sqs: Tensors,
    outs: Tensors,
    step: int,
    beta2: float,
    eps: float,
) -> None:
    """Writes the grafting method's own steps for `vectors` into `outs`, and takes `grads` into the second moments.

    Args:
        vectors: [numel] fp32 each, what is preconditioned; divided by its norm for a normalised method.
        grads: [numel] fp32 each, the raw gradient; divided by its norm likewise.
        exp_avg_sqs: [numel] fp32 each, the second moment (a sum for adagrad).
        outs: [numel] fp32 each, may be neither `vectors` nor `grads`.
    """
    method = grafting.removesuffix("_normalized")
    if method in ("none", "sgd"):
        torch._foreach_copy_(outs, vectors)
        return
    correction = 1 / math.sqrt(1 - beta2**step) if method == "adam" else 1.0
    decay = 1.0 if method == "adagrad" else beta2
    kernels.divide_by_root(vectors, grads, exp_avg_sqs, outs, beta2=decay, factor=correction, eps=eps)
