"""Exceptions at every line of the part of a step that may wait: whatever comes after has the same bits."""

from __future__ import annotations

import gc
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import ds_shampoo
from ds_shampoo.algorithm.blocks import cut
from ds_shampoo.algorithm.inverse_roots import InverseRoot, inverse_root
from ds_shampoo.algorithm.preconditioners import ShampooPreconditioner
from ds_shampoo.config import GroupSettings, parse
from ds_shampoo.roots import jobs
from ds_shampoo.roots.keeper import RootCounts, RootKeeper
from ds_shampoo.roots.service import RootService
from ds_shampoo.roots.tasks import WorkerError

BLOCKS, STEPS, BETA = 2, 9, 0.5
PACKAGE = str(Path(ds_shampoo.__file__).parent)


class Interrupted(BaseException):
    """What a signal handler raises."""


class Run:
    """A keeper at work, whose every step is prepared until that succeeds."""

    def __init__(self, delay: int, overlap: bool) -> None:
        blocked = cut("w", (4 * BLOCKS, 3), block_size=4)
        assert blocked is not None
        config = parse({"root_overlap": overlap, "root_threads": 1, "root_delay": delay, "root_interval": 3})
        self.settings = GroupSettings(statistics_beta=BETA, root_interval=3)
        self.service = RootService(config, torch.device("cpu"))
        self.stack, self.counts = ShampooPreconditioner(blocked.blocks, torch.device("cpu")), RootCounts()
        self.keeper = RootKeeper(self.stack, range(BLOCKS), self.service, self.counts)
        self.failures = 0

    def step(self, number: int, attempt: Callable[[Callable[[], None]], None] = lambda prepare: prepare()) -> None:
        clock = [number] * BLOCKS
        while True:
            try:
                attempt(lambda: self.keeper.prepare(clock, self.settings))
                break
            except (Interrupted, KeyboardInterrupt, WorkerError):
                self.failures += 1
        generator = torch.Generator().manual_seed(number)
        self.stack.update(torch.randn(BLOCKS, 4, 3, generator=generator), range(BLOCKS), BETA)
        self.keeper.advance(clock, self.settings)

    def check_buffers(self) -> None:
        """No buffer is free twice, or free and in use; all that there are count, once each."""
        transfers = self.service.transfers
        used = [copy.tensor for block in self.keeper._blocks for copy in block.reserved if copy is not None]
        for block in self.keeper._blocks:
            for job, task in zip(block.pending.jobs, block.pending.tasks, strict=True) if block.pending else ():
                self.service.settle(task)
                root = task.answer().root
                used += [job.snapshot.tensor, *([] if root is None else [root.tensor])]
        kinds = [*transfers._snapshots.values(), *transfers._results.values()]
        free = [copy.tensor for kind in kinds for copy in kind]
        assert max(Counter(tensor.data_ptr() for tensor in [*free, *used]).values()) == 1
        expected = sum(tensor.nbytes for tensor in [*free, *used])
        if transfers.bytes != expected:
            gc.collect()  # the traceback of an interrupt keeps what its frames had
        assert transfers.bytes == expected


@pytest.fixture(scope="module")
def undisturbed() -> Callable[[int], Run]:
    runs = {}

    def run(delay: int) -> Run:
        if delay not in runs:
            runs[delay] = Run(delay, overlap=False)
            for number in range(1, STEPS + 1):
                runs[delay].step(number)
        return runs[delay]

    return run


def same(a: Run, b: Run) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a.stack.roots, b.stack.roots, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(a.stack.factors, b.stack.factors, strict=True))
    assert a.stack.ready == b.stack.ready
    assert a.counts == b.counts


def interrupting(line: int) -> Callable[[Callable[[], None]], None]:
    """Calls a function and raises at its so many-th line in this package, once."""
    lines = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        nonlocal lines
        if event == "line":
            lines += 1
            if lines == line:
                raise Interrupted
        return trace

    def call(prepare: Callable[[], None]) -> None:
        former = sys.gettrace()
        sys.settrace(trace)
        try:
            prepare()
        finally:
            sys.settrace(former)

    return call


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("delay", [1, 3])
def test_an_interrupt_at_any_line_of_prepare(overlap: bool, delay: int, undisturbed: Callable[[int], Run]) -> None:
    line, interrupted = 1, True
    while interrupted:
        run = Run(delay, overlap)
        for number in range(1, STEPS + 1):
            run.step(number, interrupting(line))
        same(run, undisturbed(delay))
        run.check_buffers()
        interrupted = run.failures > 0
        line += 1 if overlap else 7  # without threads most lines are those of the root itself
    assert line > 30


@hypothesis_settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), delay=st.integers(1, 3), fatal=st.booleans())
def test_roots_that_fail_are_solved_in_the_step(seed: int, delay: int, fatal: bool) -> None:
    """MemoryError in any root of any thread, KeyboardInterrupt in those that the step solves itself."""
    generator, raised = torch.Generator().manual_seed(seed), []

    def odd(matrix: torch.Tensor, *rest: Any) -> InverseRoot:
        if torch.rand((), generator=generator) < 0.3:
            raised.append(threading.current_thread())
            if fatal and threading.current_thread() is threading.main_thread():
                raise KeyboardInterrupt
            raise MemoryError("no room")
        return inverse_root(matrix, *rest)

    expected, run = Run(delay, overlap=False), Run(delay, overlap=True)
    for number in range(1, STEPS + 1):
        expected.step(number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "inverse_root", odd)
        for number in range(1, STEPS + 1):
            run.step(number)
    same(run, expected)
    run.check_buffers()
    assert (run.service.metrics()["roots_failed"] > 0) == (len(raised) > 0)


def test_a_ctrl_c_while_the_second_factor_is_awaited(undisturbed: Callable[[int], Run]) -> None:
    run, interrupted = Run(2, overlap=True), []
    settle = run.service.settle

    def impatient(task: Any) -> None:
        second = any(block.pending is not None and block.pending.tasks[1] is task for block in run.keeper._blocks)
        if second and task not in interrupted:
            interrupted.append(task)
            raise KeyboardInterrupt
        settle(task)

    run.service.settle = impatient  # type: ignore[method-assign]
    for number in range(1, STEPS + 1):
        run.step(number)
    same(run, undisturbed(2))
    run.service.settle = settle  # type: ignore[method-assign]
    run.check_buffers()
    assert len(interrupted) == run.failures > 2


def test_without_threads_every_root_is_solved_in_the_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, undisturbed: Callable[[int], Run]
) -> None:
    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    run = Run(2, overlap=True)
    for number in range(1, STEPS + 1):
        run.step(number)
    same(run, undisturbed(2))
    assert run.service.metrics()["roots_failed"] == run.counts.updates > 0
    run.check_buffers()
    assert run.service.metrics()["root_queue_depth"] == 0
    assert "a root thread can't be started: can't start new thread; number 1 so far" in caplog.text
    assert "no root thread takes it; it is solved in the step" in caplog.text


@pytest.mark.parametrize("delay", [0, 2])
def test_a_root_that_fails_for_good_stops_prepare_alone(
    monkeypatch: pytest.MonkeyPatch, delay: int, undisturbed: Callable[[int], Run]
) -> None:
    run = Run(delay, overlap=delay > 0)
    for number in range(1, 8):
        run.step(number)
    run.check_buffers()  # which settles what is under way
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "inverse_root", lambda *_: inverse_root(torch.empty(2**50), 1, 1.0))
        run.step(8)  # the boundary of a block, which fails now or when it is due
        if delay == 2:
            run.step(9)
        before, clock = [root.clone() for root in run.stack.roots], [8 + max(delay, 1)] * BLOCKS
        for _ in range(3):
            with pytest.raises(WorkerError, match=r"block w\[\d\]: RuntimeError"):
                run.keeper.prepare(clock, run.settings)
        assert all(map(torch.equal, before, run.stack.roots))
    for number in range(clock[0], STEPS + 1):
        run.step(number)
    same(run, undisturbed(delay))
    assert run.stack.ready == [True] * BLOCKS
    run.check_buffers()
