"""Threads that solve tasks beside the training thread, and what happens when one of them dies or hangs."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from ds_shampoo.roots.crew import Crew
from ds_shampoo.roots.tasks import Executor, InlineExecutor, Task, WorkerError

__all__ = ["Executor", "InlineExecutor", "Task", "ThreadPool", "WorkerError"]

logger = logging.getLogger("ds_shampoo")

# How long closing waits for a piece of work; the threads never keep a process alive.
_CLOSE_S = 10.0


class ThreadPool:
    """Daemon threads that solve the most urgent task first.

    A worker that died, or that has been solving one task for `timeout` seconds, is replaced, and the thread that waits
    for its task solves that itself; so it does with a task that raised, and where no thread can be started. A forked
    child starts threads of its own when it submits or waits.

    An interrupt at any point of `settle` leaves everything such that settling again has the same result.

    Attributes:
        threads, cores: how many, and the cores they are pinned to together.
        waits, wait_s: how often `settle` had to wait, and for how long in all.
        failed: tasks that no thread solved, and that were solved in the step.
    """

    def __init__(
        self, threads: int, cores: Sequence[int], timeout: float, set_up: Callable[[], None] = lambda: None
    ) -> None:
        """`set_up` is called by each thread as it begins."""
        self.threads, self.cores, self.timeout = threads, tuple(cores), timeout
        self.waits, self.wait_s, self.failed = 0, 0.0, 0
        self._crew = Crew(threads, self.cores, set_up)
        self._closer = self._closing(self._crew)
        _POOLS.add(self)

    def submit(self, task: Task[Any]) -> None:
        """Takes a task on; never waits, and never raises for a thread that can't be started.

        Raises:
            RuntimeError: if the pool has been closed.
        """
        self._crew.submit(task)

    def settle(self, task: Task[Any]) -> None:
        """Returns when the task is done, on this thread if need be; a wait is counted.

        Raises:
            WorkerError: if solving it raised, in a thread and here, or twice here.
        """
        if task.done:
            return
        begin = time.monotonic()
        self.waits += 1
        self._crew.nudge()  # an interrupt may have come between queueing it and telling the threads
        try:
            while not task.done:
                if not task.orphaned:
                    self._crew.look_after(self.timeout, task)
                if task.orphaned:
                    self._solve_here(task)
                else:
                    task.wait(self._crew.next_timeout(self.timeout))
        finally:
            self.wait_s += time.monotonic() - begin

    def _solve_here(self, task: Task[Any]) -> None:
        if not task.counted:
            task.counted = True
            self.failed += 1
            if task.error is not None:
                reason = f"{type(task.error).__name__} in its root thread ({task.error})"
            else:
                reason = "its root thread died or hung" if task.lost else "no root thread takes it"
            logger.error("%s: %s; it is solved in the step", task.label, reason)
        task.solve_here()

    def queue_depth(self) -> int:
        """Tasks that wait to be begun."""
        return self._crew.queued()

    def busy_s(self) -> float:
        """Seconds in which the threads were solving something, all of them together."""
        return self._crew.busy_s()

    def busy_share(self) -> float:
        """The part of the threads' time, since the first task, in which they were solving something."""
        return self._crew.busy_share()

    def close(self) -> None:
        """Ends the threads after the pieces of work they are at, which are waited for, 10 seconds at most."""
        self._closer()

    def forked(self) -> None:
        """Puts a forked child's copy in order: it has none of the threads."""
        self._crew = self._crew.reborn()
        self._closer.detach()
        self._closer = self._closing(self._crew)

    def _closing(self, crew: Crew) -> weakref.finalize[[Crew, float], ThreadPool]:
        closer = weakref.finalize(self, Crew.close, crew, _CLOSE_S)
        closer.atexit = False  # the end of the process does not wait so long
        return closer


_POOLS: weakref.WeakSet[ThreadPool] = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_POOLS):
        pool.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
