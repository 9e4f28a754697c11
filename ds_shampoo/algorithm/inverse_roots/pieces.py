"""Where a long solution may be given up: between its pieces, which can't be interrupted themselves."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar


class StoppedError(Exception):
    """The solution is not wanted any more."""


def _go_on() -> None:
    return None


_check: ContextVar[Callable[[], None]] = ContextVar("between_pieces", default=_go_on)


def between_pieces() -> None:
    """To be called between pieces of work that may take seconds each.

    Raises:
        StoppedError: where what this thread was told to ask says so.
    """
    _check.get()()


def ask_between_pieces(check: Callable[[], None]) -> None:
    """Has solutions on the calling thread ask `check` between their pieces; it raises StoppedError to end one."""
    _check.set(check)
