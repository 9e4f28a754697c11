"""The root threads themselves: a queue, who works at what, and the end of it all.

Nothing here takes a lock. Every change that threads share is one call into C, which CPython makes in one piece, so that
no interrupt on the training thread leaves anything half done or locked.
"""

from __future__ import annotations

import atexit
import contextlib
import heapq
import itertools
import logging
import math
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from ds_shampoo.algorithm.inverse_roots import StoppedError, ask_between_pieces
from ds_shampoo.roots import gloo_threads, native
from ds_shampoo.roots.tasks import Task

logger = logging.getLogger("ds_shampoo")

# Warnings of one kind after these many occurrences, so that a run of months stays readable.
WARN_AT = frozenset({1, 10, 100, 1000, 10_000, 100_000})

# How long the end of the process waits for pieces of work; a thread that takes longer is left behind.
_EXIT_S = 0.5

# How long it waits for gloo's threads, which have microseconds to do once they get a core.
_GLOO_S = 5.0


class _Worker:
    """One thread at work.

    Attributes:
        task: what it has.
        choosing: whether it is about to have one, which is no longer in the queue then.
        began: when it began to solve the task: never, while it waits for the input.
    """

    def __init__(self) -> None:
        self.thread: threading.Thread | None = None
        self.choosing = False
        self.task: Task[Any] | None = None
        self.began = math.inf
        self.busy_s = 0.0
        self.dismissed = False

    @property
    def alive(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    @property
    def started(self) -> bool:
        return self.thread is not None and self.thread.ident is not None


class Crew:
    """What the threads share. They hold this and not the pool, so that a pool that is dropped can end them.

    Attributes:
        workers: those that solve tasks.
        dismissed: those that were given up and may still be at something.
    """

    def __init__(self, threads: int, cores: tuple[int, ...], set_up: Callable[[], None]) -> None:
        self._threads, self._cores, self._set_up = threads, cores, set_up
        # Ordered by urgency, then by number: two tasks are never compared.
        self._queue: list[tuple[tuple[int, ...], int, Task[Any]]] = []
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._numbers = itertools.count()
        self.workers: list[_Worker] = []
        self.dismissed: list[_Worker] = []
        self._closing = False
        self._former_busy_s = 0.0
        self._first = 0.0
        self._not_started = 0
        _CREWS.add(self)

    def submit(self, task: Task[Any]) -> None:
        """Queues a task; where there are no threads and none can be started, whoever waits for it solves it.

        Raises:
            RuntimeError: if the threads have been closed.
        """
        if self._closing:
            raise RuntimeError(f"{task.label}: the root threads have been closed")
        if not self.staff():
            task.orphan()
            return
        self._first = self._first or time.monotonic()
        heapq.heappush(self._queue, (task.urgency, next(self._numbers), task))
        self.nudge()

    def nudge(self) -> None:
        """Has one thread look at the queue."""
        self._wake.put(None)

    def staff(self) -> bool:
        """Starts the threads that are missing, as far as that is possible; whether there are any."""
        while len(self.workers) < self._threads and not self._closing:
            worker = _Worker()
            worker.thread = threading.Thread(target=self._work, args=(worker,), name="ds_shampoo-root", daemon=True)
            self.workers.append(worker)
            try:
                worker.thread.start()
            except (RuntimeError, MemoryError) as error:
                self._without(worker)
                self._not_started += 1
                if self._not_started in WARN_AT:
                    logger.error("a root thread can't be started: %s; number %d so far", error, self._not_started)
                break
        return bool(self.workers)

    def look_after(self, timeout: float, awaited: Task[Any]) -> None:
        """Dismisses workers that are dead or over their time, starts what is missing, and orphans what they leave.

        So it does with `awaited` where nobody has it, and where a worker died before it had a task: the next may too.
        """
        now, crippled = time.monotonic(), False
        for worker in list(self.workers):
            task, alive = worker.task, worker.alive
            if alive and not (task is not None and now - worker.began >= timeout):
                continue
            if task is None:
                crippled |= worker.started
            elif not task.done:
                task.lost = True
                task.orphan()
            worker.dismissed = True
            self._without(worker)
        # In the order in which a worker takes a task: out of the queue while it is choosing; then it has and claims it.
        if self.staff() and not crippled and (self._queued(awaited) or any(w.choosing for w in list(self.workers))):
            return
        if not (self._has(awaited) or awaited.done) and (awaited.claim() or not (self._has(awaited) or awaited.done)):
            awaited.orphan()
            self._prune()

    def _prune(self) -> None:
        """Takes out of the queue what others solve. A thread that is choosing may see the former queue: no harm, since
        it claims what it finds there."""
        left = [entry for entry in list(self._queue) if not entry[-1].claimed]
        heapq.heapify(left)
        self._queue = left

    def _has(self, task: Task[Any]) -> bool:
        return any(worker.task is task for worker in list(self.workers))

    def _queued(self, task: Task[Any]) -> bool:
        return any(entry[-1] is task for entry in list(self._queue))

    def _without(self, worker: _Worker) -> None:
        """Takes a worker off the list."""
        self.dismissed = [other for other in [*self.dismissed, worker] if other.alive]
        self._former_busy_s += worker.busy_s
        self.workers = [other for other in self.workers if other is not worker]

    def next_timeout(self, timeout: float) -> float:
        """Seconds until the first running task will be over its time; a second at most, since a thread may die."""
        began = [worker.began for worker in list(self.workers) if worker.task is not None]
        return min(1.0, max(0.0, min(began, default=time.monotonic()) + timeout - time.monotonic()))

    def queued(self) -> int:
        """Tasks that wait to be begun."""
        return sum(not entry[-1].claimed for entry in list(self._queue))

    def busy_s(self) -> float:
        """Seconds in which the threads were solving something, all of them together."""
        now = time.monotonic()
        return self._former_busy_s + sum(w.busy_s + max(0.0, now - w.began) for w in list(self.workers))

    def busy_share(self) -> float:
        """The part of the threads' time, since the first task, in which they were solving something."""
        passed = (time.monotonic() - self._first) * self._threads
        return self.busy_s() / passed if self._first and passed > 0 else 0.0

    def close(self, seconds: float) -> None:
        """Ends the threads; those that are at a piece of work are waited for, so long at most."""
        self.stop()
        _join(self.workers, time.monotonic() + seconds)

    def stop(self) -> None:
        """Has every thread end after the piece of work that it is at."""
        self._closing = True
        self._queue = []
        for _ in self.workers:
            self.nudge()

    def join(self, until: float) -> bool:
        """Waits for all threads, dismissed ones too, until this time of `time.monotonic`; whether they have ended."""
        everyone = [*self.workers, *self.dismissed]
        _join(everyone, until)
        return not any(worker.alive for worker in everyone)

    def give_way(self) -> None:
        """Has threads that can't be stopped leave the processor to the process that ends beside them."""
        for worker in [*self.workers, *self.dismissed]:
            # Only Linux has priorities of threads under the numbers of processes.
            if sys.platform == "linux" and worker.alive and worker.thread is not None and worker.thread.native_id:
                with contextlib.suppress(OSError):
                    os.setpriority(os.PRIO_PROCESS, worker.thread.native_id, 19)

    def reborn(self) -> Crew:
        """A crew without threads that has everything unfinished in its queue."""
        crew = Crew(self._threads, self._cores, self._set_up)
        running = [worker.task for worker in self.workers if worker.task is not None]
        for task in running:
            task.release_claim()
        crew._queue = [*self._queue, *((task.urgency, -1 - i, task) for i, task in enumerate(running))]
        heapq.heapify(crew._queue)
        crew._numbers = self._numbers
        for _ in crew._queue:
            crew.nudge()
        return crew

    def _work(self, worker: _Worker) -> None:
        native.compute_alone()
        self._set_up()
        if self._cores and hasattr(os, "sched_setaffinity"):
            try:
                os.sched_setaffinity(threading.get_native_id(), self._cores)
            except OSError as error:  # they were there when the plan was made
                logger.warning("a root thread can't be pinned to the cores %s: %s", self._cores, error)

        def check() -> None:
            if self._closing or worker.dismissed or (worker.task is not None and worker.task.cancelled):
                raise StoppedError

        ask_between_pieces(check)
        while not worker.dismissed and (task := self._next(worker)) is not None:
            self._solve(worker, task)
            del task  # nothing is kept alive by a thread that waits

    def _next(self, worker: _Worker) -> Task[Any] | None:
        while True:
            self._wake.get()
            if self._closing or worker.dismissed:
                self.nudge()  # it was meant for another, who may have to end as well
                return None
            worker.choosing = True
            try:
                worker.task = heapq.heappop(self._queue)[-1]
            except IndexError:
                worker.task = None
            worker.choosing = False
            if worker.task is not None and worker.task.claim():
                return worker.task
            worker.task = None

    def _solve(self, worker: _Worker, task: Task[Any]) -> None:
        try:
            task.await_input()
            worker.began = time.monotonic()
            answer = task.solve()
            if not worker.dismissed:
                task.finish(answer)
        except StoppedError:
            task.orphan()
        except Exception as error:
            if not worker.dismissed:
                task.orphan(error)
        worker.busy_s += max(0.0, time.monotonic() - worker.began)
        worker.task, worker.began = None, math.inf


def _join(workers: Sequence[_Worker], until: float) -> None:
    for worker in workers:
        if worker.alive and worker.thread is not None and worker.thread is not threading.current_thread():
            worker.thread.join(max(0.0, until - time.monotonic()))


_CREWS: weakref.WeakSet[Crew] = weakref.WeakSet()


def _end_with_the_process() -> None:
    """Ends all threads that there are, those of dropped pools too; what is inside torch by then is left behind.

    It waits for gloo's last, which would be stopped by the handler that is left behind, and never be joined.
    """
    crews = list(_CREWS)
    for crew in crews:
        crew.stop()
    until = time.monotonic() + _EXIT_S
    try:
        ended = [crew.join(until) for crew in crews]
        gloo_threads.wait_until_idle(time.monotonic() + _GLOO_S)
    except BaseException:  # an impatient user's second Ctrl-C
        native.leave_threads_behind()
        raise
    if not all(ended):
        for crew in crews:
            crew.give_way()
        native.leave_threads_behind()


atexit.register(_end_with_the_process)
