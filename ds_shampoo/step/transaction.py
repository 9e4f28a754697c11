"""A step happens or it does not: signals wait for its end, and one that broke half-way is never trained on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Those for which jobs and launchers have handlers: to end, to save, to tell the time.
_SIGNALS = tuple(
    getattr(signal, name)
    for name in (
        "SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGABRT", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGVTALRM", "SIGPROF",
        "SIGCONT", "SIGTSTP", "SIGXCPU", "SIGCHLD", "SIGBREAK",
    )
    if hasattr(signal, name)
)  # fmt: skip


class BrokenStepError(RuntimeError):
    """A step failed while it was changing weights and state; only a checkpoint brings them back together."""


class Transaction:
    """What guards the steps of one optimizer.

    A step first does everything that may wait or fail, and then changes things. What is raised before it changes
    anything leaves the optimizer as if it had not begun. A signal whose handler is Python's, Ctrl-C's among them, is
    handled when the step is done. Anything else that is raised while things change, such as a device that is out of
    memory, leaves them changed in part: every later use of the optimizer is refused until a state is loaded.
    """

    def __init__(self) -> None:
        self._changing = False
        self._broken: str | None = None

    @contextmanager
    def running(self) -> Iterator[None]:
        """Around a step, after all waiting."""
        with signals_held_back():
            self._changing = False
            try:
                yield
            except BaseException as error:
                if self._changing:
                    self.fail(error)
                raise

    def begin(self) -> None:
        """From here on the step changes weights and state."""
        self._changing = True

    def end(self) -> None:
        """Everything is changed."""
        self._changing = False

    def fail(self, error: BaseException) -> None:
        """Things are changed in part, by a step that this ended."""
        self._broken = f"{type(error).__name__}: {error}"

    def check(self) -> None:
        """Refuses to go on with what a failed step left.

        Raises:
            BrokenStepError: with what that step raised.
        """
        if self._broken is not None:
            raise BrokenStepError(
                f"a step of Shampoo failed half-way ({self._broken}): weights and optimizer state no longer belong "
                "together; load a checkpoint of both"
            )

    def mend(self) -> None:
        """A state was loaded."""
        self._broken = None


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Has signals that arrive inside wait for the end, where their handlers are called; on the main thread alone.

    Only handlers written in Python matter: those alone can raise between two statements.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    gate = _Gate()
    try:
        gate.shut()
        yield
    finally:
        gate.open()


class _Gate:
    """Stands in for Python's signal handlers; once open it passes every signal on, should one still reach it."""

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._arrived: dict[int, FrameType | None] = {}
        self._holding = True

    def shut(self) -> None:
        for number in _SIGNALS:
            handler = signal.getsignal(number)
            if callable(handler):
                self._handlers[int(number)] = handler
                signal.signal(number, self._handle)

    def open(self) -> None:
        self._holding = False
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)
        self._pass_on()

    def _pass_on(self) -> None:
        """Calls the handlers of what has arrived, in that order, all of them though one raises."""
        while self._arrived:
            number = next(iter(self._arrived))
            frame = self._arrived.pop(number)
            try:
                self._handlers[number](number, frame)
            except BaseException:
                self._pass_on()
                raise

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._holding:
            self._arrived[number] = frame
        else:
            self._handlers[number](number, frame)
