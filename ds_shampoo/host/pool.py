"""Threads that solve tasks beside the training thread, and what happens when one of them dies or hangs."""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar, cast

import torch

logger = logging.getLogger("ds_shampoo")

Answer = TypeVar("Answer")

# How long closing waits for a task that is being solved; the threads never keep a process alive.
_CLOSE_S = 10.0


class WorkerError(RuntimeError):
    """A task raised in a worker thread; the message names the task, the cause is what it raised."""


class Task(Generic[Answer]):
    """Something to solve, and what came of it. Solving it again gives the same answer.

    Attributes:
        label: what an error names.
        urgency: tasks are begun in ascending order of it.
        lost: whether the worker that had it died or hung, and may still read what the task reads.
    """

    def __init__(
        self, label: str, urgency: tuple[int, ...], solve: Callable[[], Answer], await_input: Callable[[], object]
    ) -> None:
        """`await_input` returns once `solve` can begin without waiting for anyone."""
        self.label, self.urgency, self.lost = label, urgency, False
        self._solve, self.await_input = solve, await_input
        self._outcome: tuple[Answer | None, Exception | None] | None = None

    @property
    def done(self) -> bool:
        return self._outcome is not None

    def attempt(self) -> tuple[Answer | None, Exception | None]:
        """Solves the task on the calling thread: the answer, or what solving it raised."""
        try:
            return self._solve(), None
        except Exception as error:
            return None, error

    def finish(self, outcome: tuple[Answer | None, Exception | None]) -> None:
        self._outcome = outcome

    def answer(self) -> Answer:
        """The answer of a task that is done.

        Raises:
            WorkerError: if solving it raised.
        """
        assert self._outcome is not None
        answer, error = self._outcome
        if error is not None:
            raise WorkerError(f"{self.label}: {type(error).__name__}: {error}") from error
        return cast(Answer, answer)


class Executor(Protocol):
    """Where tasks are solved."""

    def submit(self, task: Task[Any]) -> None:
        """Takes a task on."""

    def settle(self, task: Task[Any]) -> None:
        """Returns when the task is done."""


class InlineExecutor:
    """Solves every task at once, on the thread that submits it."""

    def submit(self, task: Task[Any]) -> None:
        with single_threaded():
            task.finish(task.attempt())

    def settle(self, task: Task[Any]) -> None:
        assert task.done


class ThreadPool:
    """Daemon threads that solve the most urgent task first.

    A worker that died, or that has been solving one task for `timeout` seconds, is replaced, and the thread that waits
    for its task solves that itself. A forked child starts threads of its own when it submits or waits.

    Attributes:
        threads, cores: how many, and the cores they are pinned to together.
        waits, wait_s: how often `settle` had to wait, and for how long in all.
        lost: tasks taken from a dead or hung worker.
    """

    def __init__(
        self, threads: int, cores: Sequence[int], timeout: float, set_up: Callable[[], None] = lambda: None
    ) -> None:
        """`set_up` is called by each thread as it begins."""
        self.threads, self.cores, self.timeout = threads, tuple(cores), timeout
        self.waits, self.wait_s, self.lost = 0, 0.0, 0
        self._crew = _Crew(threads, self.cores, set_up)
        self._closer = weakref.finalize(self, _Crew.close, self._crew, _CLOSE_S)
        _POOLS.add(self)

    def submit(self, task: Task[Any]) -> None:
        self._crew.submit(task)

    def settle(self, task: Task[Any]) -> None:
        """Returns when the task is done, on this thread if need be; a wait is counted."""
        if task.done:
            return
        begin = time.monotonic()
        self.waits += 1
        try:
            while not task.done:
                if task.lost:
                    logger.error("%s: its root thread died or hung; it is solved in the step", task.label)
                    with single_threaded():
                        task.finish(task.attempt())
                elif not self._crew.wait_for(task, self._crew.next_timeout(self.timeout)):
                    self.lost += self._crew.replace_lost(self.timeout, task)
        finally:
            self.wait_s += time.monotonic() - begin

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
        """Ends the threads; a task that is being solved is waited for, for 10 seconds at most."""
        self._closer()

    def forked(self) -> None:
        """Puts a forked child's copy in order: it has none of the threads, and a lock that nobody may ever release."""
        self._crew = self._crew.reborn()
        self._closer.detach()
        self._closer = weakref.finalize(self, _Crew.close, self._crew, _CLOSE_S)


class _Worker:
    """One thread, the task that it has, and when it began to solve it: never, while it waits for the input."""

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.task: Task[Any] | None = None
        self.began = math.inf
        self.dismissed = False


class _Crew:
    """What the threads share. They hold this and not the pool, so that a pool that is dropped can end them."""

    def __init__(self, threads: int, cores: tuple[int, ...], set_up: Callable[[], None]) -> None:
        self._threads, self._cores, self._set_up = threads, cores, set_up
        self._changed = threading.Condition()
        self._queue: list[tuple[tuple[int, ...], int, Task[Any]]] = []
        self._numbers = itertools.count()
        self._workers: list[_Worker] = []
        self._closing = False
        self._busy_s = 0.0
        self._first = 0.0

    def submit(self, task: Task[Any]) -> None:
        with self._changed:
            if self._closing:
                raise RuntimeError(f"{task.label}: the root threads have been closed")
            while len(self._workers) < self._threads:
                self._start_worker()
            self._first = self._first or time.monotonic()
            heapq.heappush(self._queue, (task.urgency, next(self._numbers), task))
            self._changed.notify()

    def wait_for(self, task: Task[Any], seconds: float) -> bool:
        """Whether the task was done within these seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: task.done, seconds)

    def next_timeout(self, timeout: float) -> float:
        """Seconds until the first running task will be over its time; a second at most, since a thread may die."""
        with self._changed:
            began = [worker.began for worker in self._workers if worker.task is not None]
        return min(1.0, max(0.0, min(began, default=time.monotonic()) + timeout - time.monotonic()))

    def replace_lost(self, timeout: float, awaited: Task[Any]) -> int:
        """Dismisses workers that are dead or over their time, and starts what is missing.

        Where a worker died before it had a task, the next may do so too: `awaited` is then taken out of the queue.

        Returns:
            How many tasks were taken away.
        """
        now, lost = time.monotonic(), 0
        with self._changed:
            for worker in list(self._workers):
                assert worker.thread is not None
                hung = worker.task is not None and now - worker.began >= timeout
                if hung or not worker.thread.is_alive():
                    worker.dismissed = True
                    self._workers.remove(worker)
                    found = worker.task or self._withdrawn(awaited)
                    if found is not None:
                        found.lost = True
                        lost += 1
            while len(self._workers) < self._threads:
                self._start_worker()
        return lost

    def _withdrawn(self, task: Task[Any]) -> Task[Any] | None:
        """The task, taken out of the queue; None where it isn't there."""
        left = [entry for entry in self._queue if entry[-1] is not task]
        if len(left) == len(self._queue):
            return None
        self._queue = left
        heapq.heapify(self._queue)
        return task

    def queued(self) -> int:
        with self._changed:
            return len(self._queue)

    def busy_s(self) -> float:
        with self._changed:
            return self._busy_until(time.monotonic())

    def busy_share(self) -> float:
        with self._changed:
            now = time.monotonic()
            passed = (now - self._first) * self._threads
            return self._busy_until(now) / passed if self._first and passed > 0 else 0.0

    def _busy_until(self, now: float) -> float:
        return self._busy_s + sum(max(0.0, now - worker.began) for worker in self._workers if worker.task is not None)

    def close(self, seconds: float) -> None:
        with self._changed:
            self._closing = True
            self._queue.clear()
            workers = list(self._workers)
            self._changed.notify_all()
        end = time.monotonic() + seconds
        for worker in workers:
            if worker.thread is not None and worker.thread is not threading.current_thread():
                worker.thread.join(max(0.0, end - time.monotonic()))

    def reborn(self) -> _Crew:
        """A crew without threads that has everything unfinished in its queue."""
        crew = _Crew(self._threads, self._cores, self._set_up)
        unfinished = [worker.task for worker in self._workers if worker.task is not None]
        crew._queue = [*self._queue, *((task.urgency, -1 - i, task) for i, task in enumerate(unfinished))]
        heapq.heapify(crew._queue)
        crew._numbers = self._numbers
        return crew

    def _start_worker(self) -> None:
        worker = _Worker()
        worker.thread = threading.Thread(target=self._work, args=(worker,), name="ds_shampoo-root", daemon=True)
        self._workers.append(worker)
        worker.thread.start()

    def _work(self, worker: _Worker) -> None:
        torch.set_num_threads(1)  # holds for this thread alone
        self._set_up()
        if self._cores and hasattr(os, "sched_setaffinity"):
            try:
                os.sched_setaffinity(threading.get_native_id(), self._cores)
            except OSError as error:  # they were there when the plan was made
                logger.warning("a root thread can't be pinned to the cores %s: %s", self._cores, error)
        while (task := self._next(worker)) is not None:
            task.await_input()
            with self._changed:
                worker.began = time.monotonic()
            outcome = task.attempt()
            with self._changed:
                self._busy_s += time.monotonic() - worker.began
                worker.task, worker.began = None, math.inf
                if not worker.dismissed:
                    task.finish(outcome)
                    self._changed.notify_all()
            del task, outcome  # nothing is kept alive by a thread that waits

    def _next(self, worker: _Worker) -> Task[Any] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closing or worker.dismissed)
            if self._closing or worker.dismissed:
                return None
            _, _, worker.task = heapq.heappop(self._queue)
            return worker.task


_POOLS: weakref.WeakSet[ThreadPool] = weakref.WeakSet()


def _after_fork() -> None:
    for pool in list(_POOLS):
        pool.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Holds torch to one OpenMP thread: eigh on several threads of shared cores is up to 75 times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
