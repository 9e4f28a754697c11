"""Something to solve on the host, who may solve it, and what came of it."""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from ds_shampoo.roots.native import single_threaded

Answer = TypeVar("Answer")

# What solving raises where memory, threads or LAPACK fail; anything else that the training thread meets passes through.
_FAILURES: tuple[type[Exception], ...] = (MemoryError, RuntimeError)


class WorkerError(RuntimeError):
    """A task could not be solved, twice; the message names the task, the cause is what solving it raised."""


class Task(Generic[Answer]):
    """Something to solve, and what came of it. Solving it again gives the same answer.

    Every method is one change that no interrupt can tear, or can be called again after one.

    Attributes:
        label: what an error names.
        urgency: tasks are begun in ascending order of it.
        lost: whether a worker that died, hangs or was not told to stop may still read what the task reads.
        orphaned: whether no worker will solve it: the thread that waits for it does.
        counted: whether that was counted.
        cancelled: whether nobody wants the answer any more.
        error: what solving it raised last.
    """

    def __init__(
        self,
        label: str,
        urgency: tuple[int, ...],
        solve: Callable[[], Answer],
        await_input: Callable[[], object] = lambda: None,
    ) -> None:
        """`await_input` returns once `solve` can begin without waiting for anyone."""
        self.label, self.urgency, self.await_input = label, urgency, await_input
        self.lost = self.orphaned = self.counted = self.cancelled = False
        self.error: Exception | None = None
        self._solve = solve
        self._answer: tuple[Answer] | None = None
        self._unclaimed = [True]
        self._settled = threading.Lock()
        self._settled.acquire()

    @property
    def done(self) -> bool:
        """Whether it has an answer."""
        return self._answer is not None

    @property
    def claimed(self) -> bool:
        return not self._unclaimed

    def claim(self) -> bool:
        """Whether the caller, and nobody else, is to solve it."""
        try:
            return self._unclaimed.pop()
        except IndexError:
            return False

    def release_claim(self) -> None:
        """Lets another one claim it; for a forked child, in which who claimed it is missing."""
        self._unclaimed = [True]

    def solve(self) -> Answer:
        """The answer; raises whatever solving raises."""
        return self._solve()

    def finish(self, answer: Answer) -> None:
        """Takes an answer; the first one stays."""
        if self._answer is None:
            self._answer = (answer,)
        self._wake()

    def orphan(self, error: Exception | None = None) -> None:
        """Leaves the task to the thread that waits for it."""
        self.error = error or self.error
        self.orphaned = True
        self._wake()

    def wait(self, seconds: float) -> None:
        """Returns when the task has an answer or is orphaned, or after these seconds."""
        if self._settled.acquire(timeout=seconds):
            self._settled.release()

    def solve_here(self) -> None:
        """Solves it on the calling thread. The first time that solving raises is forgiven.

        Raises:
            WorkerError: if solving it had raised before and does again; it may be tried again later.
        """
        failures = _FAILURES if self.error is None else (*_FAILURES, type(self.error))
        try:
            with single_threaded():
                answer = self._solve()
        except failures as error:
            if _by_signal_handler(error):
                raise
            former, self.error = self.error, error
            if former is not None:
                raise WorkerError(f"{self.label}: {type(error).__name__}: {error}") from error
            return
        self.finish(answer)

    def answer(self) -> Answer:
        """The answer of a task that is done."""
        assert self._answer is not None
        return self._answer[0]

    def _wake(self) -> None:
        if self._settled.locked():
            try:
                self._settled.release()
            except RuntimeError:  # another thread has just done it
                return


def _by_signal_handler(error: BaseException) -> bool:
    """Whether a signal handler raised it, in the middle of whatever was solved: then it is for the caller."""
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    codes = {getattr(getattr(handler, "__func__", handler), "__code__", None) for handler in handlers}
    return any(frame.f_code in codes for frame, _ in traceback.walk_tb(error.__traceback__))


class Executor(Protocol):
    """Where tasks are solved.

    Attributes:
        failed: tasks that were solved in the step since a thread died, hung or could not be started, or since solving
            them had raised.
    """

    failed: int

    def submit(self, task: Task[Any]) -> None:
        """Takes a task on."""

    def settle(self, task: Task[Any]) -> None:
        """Returns when the task is done.

        Raises:
            WorkerError: if solving it raised, there and again on this thread. Settling it again tries again.
        """


class InlineExecutor:
    """Solves every task on the thread that needs it, when that needs it."""

    def __init__(self) -> None:
        self.failed = 0

    def submit(self, task: Task[Any]) -> None:
        task.orphan()

    def settle(self, task: Task[Any]) -> None:
        while not task.done:
            if task.error is not None and not task.counted:
                task.counted = True
                self.failed += 1
            task.solve_here()
