"""How the fp32 products of the step may be computed: in torch's words, for the time of a `with` block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Literal

import torch

MatmulPrecision = Literal["highest", "high", "medium"]

# What `torch.set_float32_matmul_precision` sets, by backend: CUDA has no bfloat16 form of an fp32 product.
_BY_BACKEND = {
    "highest": {"cuda": "ieee", "mkldnn": "ieee"},
    "high": {"cuda": "tf32", "mkldnn": "tf32"},
    "medium": {"cuda": "tf32", "mkldnn": "bf16"},
}


_in_force: ContextVar[MatmulPrecision] = ContextVar("matmul_precision", default="highest")


def in_force() -> MatmulPrecision:
    """What the innermost `matmul_precision` around this says."""
    return _in_force.get()


@contextlib.contextmanager
def matmul_precision(precision: MatmulPrecision) -> Iterator[None]:
    """Products of fp32 tensors round their inputs at most so far; afterwards the job's own setting holds again.

    Args:
        precision: "highest" (fp32), "high" (TF32: 10 mantissa bits) or "medium" (bfloat16: 7 bits), of the inputs;
            sums are fp32 always. A device without such a mode computes more precisely.

    The setting is the process's, not the thread's. fp64 products, hence the roots, are not touched by it.
    """
    token = _in_force.set(precision)
    try:
        with _torch_allows(precision):
            yield
    finally:
        _in_force.reset(token)


@contextlib.contextmanager
def _torch_allows(precision: MatmulPrecision) -> Iterator[None]:
    if not hasattr(torch.backends.mkldnn, "matmul"):  # torch before 2.9
        job_wide = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(job_wide)
        return
    # Backend by backend, since torch refuses to read its older, global setting where a job has used these.
    backends: dict[str, Any] = {"cuda": torch.backends.cuda.matmul, "mkldnn": torch.backends.mkldnn.matmul}
    own = {name: backend.fp32_precision for name, backend in backends.items()}
    try:
        for name, backend in backends.items():
            backend.fp32_precision = _BY_BACKEND[precision][name]
        yield
    finally:
        for name, backend in backends.items():
            backend.fp32_precision = own[name]
