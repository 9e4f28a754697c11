"""The pool of root threads: order, errors, dead and hung workers, waiting, closing and forking."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from ds_shampoo.roots.native import single_threaded
from ds_shampoo.roots.pool import InlineExecutor, Task, ThreadPool, WorkerError

LONG = 60.0


@pytest.fixture
def pool() -> Iterator[ThreadPool]:
    pool = ThreadPool(1, (), LONG)
    yield pool
    pool.close()


def task(
    solve: Callable[[], object],
    *urgency: int,
    label: str = "block w[0]",
    await_input: Callable[[], object] = lambda: None,
) -> Task[object]:
    return Task(label, urgency, solve, await_input)


def solved(pool: ThreadPool, task: Task[object]) -> object:
    pool.settle(task)
    return task.answer()


def once(first: Callable[[], object], later: object) -> Callable[[], object]:
    """A function whose first call does one thing, and whose later calls return another."""
    calls = iter([first])
    return lambda: next(calls, lambda: later)()


@pytest.fixture
def root_threads() -> Callable[[], int]:
    """Counts the root threads that were started since; other tests' optimizers may still have theirs."""

    def present() -> set[int | None]:
        return {thread.ident for thread in threading.enumerate() if thread.name == "ds_shampoo-root"}

    before = present()
    return lambda: len(present() - before)


def test_the_most_urgent_first(pool: ThreadPool) -> None:
    gate, order = threading.Event(), []
    first = task(gate.wait, 0)
    pool.submit(first)
    while pool.queue_depth():
        time.sleep(0.001)
    late = [task(lambda key=key: order.append(key), *key) for key in [(7, -9), (5, -1), (5, -8), (6, -3)]]
    for item in late:
        pool.submit(item)
    assert pool.queue_depth() == 4
    gate.set()
    for item in late:
        pool.settle(item)
    assert order == [(5, -8), (5, -1), (6, -3), (7, -9)]
    assert 0 < pool.busy_share() <= 1


def test_waits_are_counted_and_only_waits(pool: ThreadPool) -> None:
    done = task(lambda: 1)
    pool.submit(done)
    while not done.done:
        time.sleep(0.001)
    assert solved(pool, done) == 1
    assert (pool.waits, pool.wait_s) == (0, 0.0)
    slow = task(lambda: time.sleep(0.05))
    pool.submit(slow)
    pool.settle(slow)
    assert pool.waits == 1
    assert pool.wait_s > 0.01


@pytest.mark.parametrize("inline", [True, False])
def test_an_exception_reaches_the_caller_with_the_blocks_name(pool: ThreadPool, inline: bool) -> None:
    def fails() -> None:
        raise MemoryError("out of it")

    outcomes = iter([fails, fails, fails, lambda: 3])
    failing = task(lambda: next(outcomes)(), label="block wte[3]")
    executor = InlineExecutor() if inline else pool
    executor.submit(failing)
    for _ in range(2):
        with pytest.raises(WorkerError, match=r"block wte\[3\]: MemoryError: out of it") as caught:
            executor.settle(failing)
        assert isinstance(caught.value.__cause__, MemoryError)
    executor.settle(failing)
    assert failing.answer() == 3
    assert executor.failed == 1
    healthy = task(lambda: 2)
    executor.submit(healthy)
    executor.settle(healthy)
    assert healthy.answer() == 2


@pytest.mark.parametrize("kind", [RuntimeError, KeyError, TimeoutError, KeyboardInterrupt])
def test_what_a_signal_handler_raises_is_the_callers(kind: type[BaseException]) -> None:
    def handler(*_: object) -> None:
        raise kind("preempted")

    former, executor = signal.signal(signal.SIGUSR1, handler), InlineExecutor()
    interrupted = task(once(lambda: signal.raise_signal(signal.SIGUSR1), 4))
    try:
        executor.submit(interrupted)
        with pytest.raises(kind, match="preempted") as caught:
            executor.settle(interrupted)
        assert type(caught.value) is kind
        executor.settle(interrupted)
    finally:
        signal.signal(signal.SIGUSR1, former)
    assert interrupted.answer() == 4
    assert executor.failed == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_threads_that_always_die_leave_nothing_in_the_queue() -> None:
    def fails() -> None:
        raise RuntimeError("no such device")

    pool = ThreadPool(1, (), LONG, fails)
    for number in range(20):
        item = task(lambda: 1, number)
        pool.submit(item)
        pool.settle(item)
    assert len(pool._crew._queue) <= 1
    pool.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_worker_is_replaced_and_its_task_solved_in_the_step(pool: ThreadPool) -> None:
    def dies() -> None:
        raise SystemExit

    lost, behind = task(once(dies, "again"), 0), task(lambda: threading.current_thread().name, 1)
    pool.submit(lost)
    pool.submit(behind)
    assert solved(pool, lost) == "again"
    assert lost.lost
    assert pool.failed == 1
    assert solved(pool, behind) == "ds_shampoo-root"
    assert not behind.lost


def test_a_hung_worker_is_replaced_and_what_it_says_later_is_ignored(root_threads: Callable[[], int]) -> None:
    pool, gate, hung = ThreadPool(1, (), 0.2), threading.Event(), []

    def hangs() -> str:
        hung.append(threading.current_thread())
        gate.wait()
        return "late"

    lost, behind = task(once(hangs, "again"), 0), task(lambda: "behind", 1)
    pool.submit(lost)
    pool.submit(behind)
    assert solved(pool, behind) == "behind"  # waiting for another task finds the hung one too
    assert solved(pool, lost) == "again"
    assert pool.failed == 1
    gate.set()
    hung[0].join(LONG)
    assert not hung[0].is_alive()  # nobody needs to wake it
    assert lost.answer() == "again"
    pool.close()
    assert root_threads() == 0


def test_waiting_for_the_input_is_neither_work_nor_a_hang() -> None:
    pool, gate = ThreadPool(1, (), 0.1), threading.Event()
    late = task(lambda: 1, await_input=gate.wait)
    pool.submit(late)
    opener = threading.Timer(0.5, gate.set)
    opener.start()
    assert solved(pool, late) == 1
    assert pool.failed == 0
    assert pool.busy_s() < 0.1
    pool.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_threads_that_die_before_they_have_a_task_hold_nobody_up() -> None:
    def fails() -> None:
        raise RuntimeError("no such device")

    pool = ThreadPool(2, (), LONG, fails)
    for number in range(2):
        never = task(lambda number=number: number)
        pool.submit(never)
        assert solved(pool, never) == number
    assert pool.failed == 2
    pool.close()


def test_cores_that_went_away_are_done_without(caplog: pytest.LogCaptureFixture) -> None:
    pool = ThreadPool(1, (2**15,), LONG)
    item = task(lambda: 1)
    pool.submit(item)
    assert solved(pool, item) == 1
    assert pool.failed == 0
    assert "can't be pinned to the cores (32768,)" in caplog.text
    pool.close()


def test_threads_are_pinned_and_single_and_leave_others_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    core = max(os.sched_getaffinity(0))
    pool = ThreadPool(2, (core,), LONG)
    for _ in range(4):
        seen = task(lambda: (torch.get_num_threads(), os.sched_getaffinity(threading.get_native_id())))
        pool.submit(seen)
        assert solved(pool, seen) == (1, {core})
    assert torch.get_num_threads() == 2
    assert len(os.sched_getaffinity(0)) >= len({core})
    pool.close()
    torch.set_num_threads(before)


def test_closing_ends_the_threads_and_refuses_more(root_threads: Callable[[], int]) -> None:
    pool = ThreadPool(3, (), LONG)
    first = task(lambda: 1)
    pool.submit(first)
    pool.settle(first)
    assert root_threads() == 3
    pool.close()
    pool.close()
    assert root_threads() == 0
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit(task(lambda: 1))


def test_a_pool_that_is_dropped_takes_its_threads_along(root_threads: Callable[[], int]) -> None:
    pool = ThreadPool(2, (), LONG)
    pool.submit(task(lambda: 1))
    assert root_threads() == 2
    del pool
    gc.collect()
    assert root_threads() == 0


def test_a_forked_child_solves_what_was_under_way(pool: ThreadPool) -> None:
    gate = threading.Event()
    running, queued = task(once(lambda: gate.wait() and 1, 1), 0), task(lambda: 2, 1)
    pool.submit(running)
    pool.submit(queued)
    while pool.queue_depth() != 1:
        time.sleep(0.001)
    child = os.fork()
    if child == 0:  # the gate stays shut here; the running task is begun anew by a thread of the child's own
        code = 1
        try:
            code = 0 if (solved(pool, running), solved(pool, queued)) == (1, 2) else 2
        finally:
            os._exit(code)
    gate.set()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert solved(pool, running) == 1
    assert solved(pool, queued) == 2


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)

    def fails() -> None:
        with single_threaded():
            assert torch.get_num_threads() == 1
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)
