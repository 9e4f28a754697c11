"""The arithmetic of the elementwise step and of the norms, on lists of tensors: torch's kernels, or NVIDIA apex's."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

Tensors = list[Tensor]

# What the trial at start forgives: the roundings of fp32, and those of FusedAdam's 1 - beta2.
_TRIAL_RTOL = 1e-4
# apex's kernels count the elements of a tensor in 32 bits.
_APEX_LARGEST = 2**31 - 1


class TorchKernels:
    """torch's: `_foreach` for several tensors; a single one, which may be large, without memory for a result.

    Both ways round alike, so that no tensor's numbers depend on what else is worked on with it. Lists are never
    empty; those of one call have tensors of pairwise equal shapes on one device, fp32 unless said otherwise.

    Attributes:
        name: for the table at start.
    """

    def __init__(self, name: str = "torch") -> None:
        self.name = name

    def lerp(self, starts: Tensors, ends: Tensors, outs: Tensors, *, weight: float, factor: float = 1.0) -> None:
        """outs <- factor (starts + weight (ends - starts)); `outs` may be either list."""
        if len(outs) == 1:
            torch.lerp(starts[0], ends[0], weight, out=outs[0])
        else:
            torch._foreach_copy_(outs, torch._foreach_lerp(starts, ends, weight))
        if factor != 1:
            torch._foreach_mul_(outs, factor)

    def scale(self, inputs: Tensors, factor: float, outs: Tensors) -> None:
        """outs <- factor inputs; `outs` may be `inputs`."""
        if len(outs) == 1:
            torch.mul(inputs[0], factor, out=outs[0])
        else:
            torch._foreach_copy_(outs, torch._foreach_mul(inputs, factor))

    def divide_by_root(
        self,
        vectors: Tensors,
        grads: Tensors,
        squares: Tensors,
        outs: Tensors,
        *,
        beta2: float,
        factor: float,
        eps: float,
    ) -> None:
        """squares <- beta2 squares + (1 - beta2) grads², then outs <- vectors / (factor sqrt(squares) + eps).

        A `beta2` of 1 sums: squares + grads². `vectors` may be `grads`; `outs` are neither.
        """
        if beta2 != 1:
            torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2 if beta2 != 1 else 1)
        if len(outs) == 1:
            out = torch.sqrt(squares[0], out=outs[0])
            torch.add(eps, out, alpha=factor, out=out)
            torch.div(vectors[0], out, out=out)
        else:
            torch._foreach_zero_(outs)
            torch._foreach_add_(outs, eps)
            torch._foreach_add_(outs, torch._foreach_sqrt(squares), alpha=factor)
            torch._foreach_copy_(outs, torch._foreach_div(vectors, outs))

    def apply_update(self, params: Tensors, updates: Tensors, lr: float, weight_decay: float) -> None:
        """params <- params - lr (updates + weight_decay params); `updates` are spent.

        `params` are of any float dtype, rounded once.
        """
        if weight_decay:
            torch._foreach_add_(updates, params, alpha=weight_decay)
        torch._foreach_add_(params, updates, alpha=-lr)

    def norms(self, tensors: Tensors) -> Tensor:
        """[len(tensors)] fp32: the Euclidean norm of each; they may have any shapes and strides, and overlap."""
        return torch.stack(torch._foreach_norm(tensors))


class ApexKernels(TorchKernels):
    """apex's, for lists of dense fp32 tensors; any other list is torch's.

    With default settings a step reads or writes 17 numbers for each parameter, torch's 23. Sums of squares
    (adagrad) stay torch's: apex has a kernel for them that divides the gradient itself, but no other vector.
    """

    def __init__(self, applier: Any, amp_c: Any, device: torch.device) -> None:
        """`applier` is `apex.multi_tensor_apply.multi_tensor_applier`, `amp_c` the module of compiled kernels."""
        super().__init__("NVIDIA apex")
        self._applier, self._amp_c = applier, amp_c
        self._flag = torch.zeros(1, dtype=torch.int32, device=device)

    def lerp(self, starts: Tensors, ends: Tensors, outs: Tensors, *, weight: float, factor: float = 1.0) -> None:
        if _fit(starts, ends, outs):
            self._axpby(starts, ends, outs, a=factor * (1 - weight), b=factor * weight)
        else:
            super().lerp(starts, ends, outs, weight=weight, factor=factor)

    def scale(self, inputs: Tensors, factor: float, outs: Tensors) -> None:
        if _fit(inputs, outs):
            self._run("scale", [inputs, outs], factor)
        else:
            super().scale(inputs, factor, outs)

    def divide_by_root(
        self,
        vectors: Tensors,
        grads: Tensors,
        squares: Tensors,
        outs: Tensors,
        *,
        beta2: float,
        factor: float,
        eps: float,
    ) -> None:
        """FusedAdam's kernel on parameters of 0, with a beta1 of 1, which leaves `vectors` as its first moments.

        Without its own bias corrections it steps by -lr vectors / (sqrt(squares) + eps), so that lr and eps carry
        the factor. It takes 1 - beta2 in fp32, as for FusedAdam: off by 1.3e-5 of it for a beta2 of 0.999.
        """
        if beta2 != 1 and _fit(vectors, grads, squares, outs):
            torch._foreach_zero_(outs)
            lr, beta1, step, decoupled, bias_correction, decay = -1 / factor, 1.0, 1, 1, 0, 0.0
            numbers = lr, beta1, beta2, eps / factor, step, decoupled, bias_correction, decay
            self._run("adam", [grads, outs, vectors, squares], *numbers)
        else:
            super().divide_by_root(vectors, grads, squares, outs, beta2=beta2, factor=factor, eps=eps)

    def apply_update(self, params: Tensors, updates: Tensors, lr: float, weight_decay: float) -> None:
        if _fit(params, updates):
            if weight_decay:  # by itself: fp32 has few digits for 1 - lr weight_decay
                self._axpby(updates, params, updates, a=1.0, b=weight_decay)
            self._axpby(params, updates, params, a=1.0, b=-lr)
        else:
            super().apply_update(params, updates, lr, weight_decay)

    def norms(self, tensors: Tensors) -> Tensor:
        """Dense ones together; others, such as blocks of columns, torch too takes one by one."""
        dense = [tensor for tensor in tensors if _fit([tensor])]
        found = iter(self._run("l2norm", [dense], True)[1] if dense else ())
        return torch.stack([next(found) if _fit([t]) else torch.linalg.vector_norm(t) for t in tensors])

    def _axpby(self, xs: Tensors, ys: Tensors, outs: Tensors, *, a: float, b: float) -> None:
        """outs <- a xs + b ys; the last argument has the kernel look for infinities in both."""
        self._run("axpby", [xs, ys, outs], a, b, -1)

    def _run(self, kernel: str, lists: list[Tensors], *arguments: Any) -> Any:
        """A kernel on its tensors' device; the flag that it raises at an infinity, and may stop at, is not used."""
        self._flag.zero_()
        device_of: Any = torch.cuda.device_of
        with device_of(self._flag):
            return self._applier(getattr(self._amp_c, f"multi_tensor_{kernel}"), self._flag, lists, *arguments)


@functools.cache
def kernels_for(device: torch.device) -> TorchKernels:
    """apex's on a CUDA device where they are installed and pass a trial, torch's everywhere else."""
    return _apex_or_torch(device) if device.type == "cuda" else TorchKernels()


def _apex_or_torch(device: torch.device) -> TorchKernels:
    """The trial is for builds of apex that do not fit this torch, or whose kernels take other arguments."""
    try:
        kernels = ApexKernels(*find_apex(), device)
        if not torch.allclose(_trial(kernels, device), _trial(TorchKernels(), device), rtol=_TRIAL_RTOL):
            raise RuntimeError("it gives other numbers than torch")
    except Exception as error:
        return TorchKernels(f"torch (NVIDIA apex is not used: {error})")
    return kernels


def find_apex() -> tuple[Any, Any]:
    """`multi_tensor_applier` and `amp_C` of NVIDIA's apex.

    Raises:
        ImportError: where there is none; PyPI's `apex`, a toolkit for Pyramid, may raise anything else.
    """
    apex: Any = importlib.import_module("apex")
    if not (hasattr(apex, "optimizers") and hasattr(apex.optimizers, "FusedAdam")):
        raise ImportError("the apex installed is another package of that name")
    amp_c = importlib.import_module("amp_C")  # missing from builds without CUDA extensions
    return importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier, amp_c


def describe(devices: Iterable[torch.device]) -> str:
    """One line for the table at start."""
    used = sorted({f"{kernels_for(device).name} on {device.type}" for device in devices})
    return f"elementwise step and norms: by the kernels of {', of '.join(used)}"


def _trial(kernels: TorchKernels, device: torch.device) -> Tensor:
    """What every operation makes of two small tensors, in one."""
    vectors, grads, squares, outs, params = (
        list(torch.linspace(first, 2.0, 7, dtype=torch.float32, device=device).tensor_split([4]))
        for first in (-1.0, 0.5, 0.25, 0.0, 1.0)
    )
    kernels.lerp(vectors, grads, vectors, weight=0.25, factor=1.5)
    kernels.divide_by_root(vectors, grads, squares, outs, beta2=0.75, factor=2.0, eps=0.5)
    kernels.apply_update(params, outs, 0.5, 0.25)
    kernels.scale(grads, -0.75, outs)
    return torch.cat([*vectors, *squares, *params, *outs, kernels.norms(vectors)])


def _fit(*lists: Tensors) -> bool:
    """Whether apex takes these tensors; its launch forgets what goes before an empty one at a list's end."""
    return all(
        tensor.dtype == torch.float32 and tensor.is_contiguous() and 0 < tensor.numel() <= _APEX_LARGEST
        for tensors in lists
        for tensor in tensors
    )
