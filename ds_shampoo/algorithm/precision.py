"""How the fp32 products of the step may be computed: in torch's words, for the time of a `with` block."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Literal, NamedTuple

import torch

MatmulPrecision = Literal["highest", "high", "medium"]

# The leaves of torch's tree of fp32 precisions that `set_float32_matmul_precision` writes beside its older setting.
_LEAVES = ("cuda", "matmul"), ("mkldnn", "matmul")

# Blocks of two threads one after the other: the setting is the process's, and the first to leave would undo the second.
_one_at_a_time = threading.RLock()


def _after_fork() -> None:
    """A child has none of the threads that may hold the lock."""
    global _one_at_a_time
    _one_at_a_time = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

_in_force: ContextVar[MatmulPrecision] = ContextVar("matmul_precision", default="highest")


def of_statistics(precision: MatmulPrecision) -> MatmulPrecision:
    """What a setting comes to for statistics: TF32 at most.

    A gradient that is rounded to b bits of mantissa has noise of 2^(-2b) / 12 in parts of its elements' squares: 8e-8
    with TF32's ten, well below the usual ridge of 1e-6, but 5e-6 with bfloat16's seven.
    """
    return "high" if precision == "medium" else precision


def in_force() -> MatmulPrecision:
    """What the innermost `matmul_precision` around this says."""
    return _in_force.get()


@contextlib.contextmanager
def matmul_precision(precision: MatmulPrecision) -> Iterator[None]:
    """Products of fp32 tensors round their inputs at most so far; afterwards the job's own setting holds again.

    Args:
        precision: "highest" (fp32), "high" (TF32: 10 mantissa bits) or "medium" (bfloat16: 7 bits), of the inputs;
            sums are fp32 always. A device without such a mode computes more precisely.

    Inside, torch's older and its newer way of asking agree; afterwards every level says what it said before. The
    setting is the process's: threads pass these blocks one at a time. fp64 products, hence the roots, are not touched.
    """
    token = _in_force.set(precision)
    try:
        with _one_at_a_time:
            job_wide = _read()
            try:
                torch.set_float32_matmul_precision(precision)
                yield
            finally:
                _write(job_wide)
    finally:
        _in_force.reset(token)


class _Settings(NamedTuple):
    """What a job has set: torch's older, global word, and the leaves' own ones ("none" where they inherit)."""

    overall: str
    leaves: tuple[str, ...]


def _read() -> _Settings:
    if not _has_levels():
        return _Settings(torch.get_float32_matmul_precision(), ())
    own = tuple(_own(backend, op) for backend, op in _LEAVES)
    # A job that uses the newer way makes torch refuse to read the older setting, unless the leaves are at "ieee".
    try:
        for backend, op in _LEAVES:
            _set_level(backend, op, "ieee")
        return _Settings(torch.get_float32_matmul_precision(), own)
    finally:
        _write_leaves(own)


def _write(settings: _Settings) -> None:
    torch.set_float32_matmul_precision(settings.overall)
    _write_leaves(settings.leaves)


def _write_leaves(own: Sequence[str]) -> None:
    for (backend, op), value in zip(_LEAVES, own, strict=False):
        _set_level(backend, op, value)


def _own(backend: str, op: str) -> str:
    """What a leaf itself is set to. torch tells what is in force, which may be inherited from the two levels above."""
    in_force_now, above = _level(backend, op), _level(backend, "all")
    if in_force_now == "none" or in_force_now != above:
        return in_force_now
    top = _level("generic", "all")
    try:
        _set_level("generic", "all", "none")
        above = _level(backend, "all")
        try:
            _set_level(backend, "all", "none")
            return _level(backend, op)
        finally:
            _set_level(backend, "all", above)
    finally:
        _set_level("generic", "all", top)


def _has_levels() -> bool:
    """torch before 2.9 has the older setting alone."""
    return hasattr(torch._C, "_get_fp32_precision_getter")


def _level(backend: str, op: str) -> str:
    return str(torch._C._get_fp32_precision_getter(backend, op))


def _set_level(backend: str, op: str, value: str) -> None:
    """Through torch's inner function: the public property of mkldnn as a whole writes to the level above it."""
    torch._C._set_fp32_precision_setter(backend, op, value)
