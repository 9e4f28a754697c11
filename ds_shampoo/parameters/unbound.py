"""Optimizers that no framework has laid out: those that are there, and those that are made to be laid out at once."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Generic, TypeVar

_Optimizer = TypeVar("_Optimizer")

_TO_BE_BOUND = ContextVar("to_be_bound", default=False)


class Unbound(Generic[_Optimizer]):
    """Those that are there, for as long as somebody else keeps them."""

    def __init__(self) -> None:
        self._alive: weakref.WeakSet[_Optimizer] = weakref.WeakSet()

    def __iter__(self) -> Iterator[_Optimizer]:
        return iter(list(self._alive))

    def __contains__(self, optimizer: object) -> bool:
        return optimizer in self._alive

    def add(self, optimizer: _Optimizer) -> None:
        self._alive.add(optimizer)

    def discard(self, optimizer: _Optimizer) -> None:
        self._alive.discard(optimizer)


@contextlib.contextmanager
def to_be_bound() -> Iterator[None]:
    """Has optimizers that are made meanwhile wait for `bind`, or for their first step, to make their state.

    For frameworks that call their user's code for an optimizer and lay its parameters out afterwards.
    """
    token = _TO_BE_BOUND.set(True)
    try:
        yield
    finally:
        _TO_BE_BOUND.reset(token)


def waits_to_be_bound() -> bool:
    """Whether an optimizer that is made now leaves its state for later."""
    return _TO_BE_BOUND.get()
