"""A step happens or it does not, whatever is raised in it, and wherever."""

from __future__ import annotations

import contextlib
import copy
import functools
import linecache
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import ds_shampoo
from ds_shampoo import Shampoo
from ds_shampoo.algorithm.preconditioners import ShampooPreconditioner
from ds_shampoo.roots.pool import ThreadPool, WorkerError
from ds_shampoo.step.transaction import BrokenStepError, signals_held_back

PACKAGE = str(Path(ds_shampoo.__file__).parent)
SETTINGS: dict[str, Any] = {"lr": 0.01, "block_size": 4, "root_interval": 3, "root_delay": 1, "weight_decay": 0.1}
AT, END = 7, 12


class InjectedError(Exception):
    pass


def a_job(**extra: Any) -> tuple[nn.Sequential, Shampoo]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 4))
    matrices = {"params": [p for p in model.parameters() if p.dim() > 1]}
    vectors = {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}
    return model, Shampoo([matrices, vectors], **SETTINGS, **extra)


def give_grads(model: nn.Module, step: int) -> None:
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    (model(x) - x[:, :4].sin()).square().mean().backward()


def train(model: nn.Module, optimizer: Shampoo, steps: range) -> None:
    for step in steps:
        give_grads(model, step)
        optimizer.step()


def everything(model: nn.Module, optimizer: Shampoo) -> dict[str, torch.Tensor]:
    """Every tensor and number of the job."""
    found: dict[str, torch.Tensor] = {name: p.detach().clone() for name, p in model.named_parameters()}

    def take(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                take(f"{name}.{key}", item)
        elif isinstance(value, torch.Tensor | int | float):
            found[name] = torch.as_tensor(value, dtype=torch.float64).clone()

    take("state", copy.deepcopy(optimizer.state_dict()["state"]))
    return found


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@contextmanager
def at_line(number: int, act: Callable[[], None]) -> Iterator[list[str]]:
    """Acts before the `number`th line of the package that the main thread comes to; all that it came to is listed."""
    lines: list[str] = []

    def on_line(frame: FrameType, event: str, _: Any) -> Any:
        # A `with` line is come to once more at the end of its block, where Python itself handles no signal.
        if event == "line" and not _source(frame).startswith("with "):
            lines.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
            if len(lines) == number + 1:
                act()
        return on_line

    def on_call(frame: FrameType, _: str, __: Any) -> Any:
        return on_line if frame.f_code.co_filename.startswith(PACKAGE) else None

    sys.settrace(on_call)
    try:
        yield lines
    finally:
        sys.settrace(None)


def _source(frame: FrameType) -> str:
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()


@pytest.fixture(scope="module")
def lines(half_way: tuple[dict[str, Any], dict[str, Any]]) -> list[int]:
    """Where the lines of the step are come to for the first and for the last time."""
    model, optimizer = resumed(half_way)
    give_grads(model, AT)
    with at_line(-1, fail) as passed:
        optimizer.step()
    first = {line: number for number, line in reversed(list(enumerate(passed)))}
    last = {line: number for number, line in enumerate(passed)}
    assert len(first) > 250
    return sorted({*first.values(), *last.values()})


@contextmanager
def a_handler_that_raises() -> Iterator[None]:
    """As Python's own for Ctrl-C, for another signal."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGUSR1, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, former)


def fail() -> None:
    raise InjectedError


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, torch.Tensor]:
    model, optimizer = a_job()
    train(model, optimizer, range(END))
    return everything(model, optimizer)


@pytest.fixture(scope="module")
def one_step_on(half_way: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, torch.Tensor]:
    model, optimizer = resumed(half_way)
    train(model, optimizer, range(AT, AT + 1))
    return everything(model, optimizer)


@pytest.fixture(scope="module")
def half_way() -> tuple[dict[str, Any], dict[str, Any]]:
    """The model's and the optimizer's state before the step in which something happens."""
    model, optimizer = a_job()
    train(model, optimizer, range(AT))
    return copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())


def resumed(half_way: tuple[dict[str, Any], dict[str, Any]]) -> tuple[nn.Sequential, Shampoo]:
    model, optimizer = a_job()
    model.load_state_dict(half_way[0])
    optimizer.load_state_dict(copy.deepcopy(half_way[1]))
    return model, optimizer


def goes_on(
    model: nn.Module,
    optimizer: Shampoo,
    line: int,
    one_step_on: dict[str, torch.Tensor],
    undisturbed: dict[str, torch.Tensor],
) -> None:
    assert same(everything(model, optimizer), one_step_on), line
    if line % 10 == 0:  # to run on after every line would take minutes
        train(model, optimizer, range(AT + 1, END))
        assert same(everything(model, optimizer), undisturbed), line


def test_an_exception_before_any_line(
    undisturbed: dict[str, torch.Tensor],
    one_step_on: dict[str, torch.Tensor],
    half_way: tuple[dict[str, Any], dict[str, Any]],
    lines: list[int],
) -> None:
    """The step had not begun, and taken again gives the same bits; or every use is refused until a state is loaded."""
    model, optimizer = resumed(half_way)
    not_begun, refused = 0, 0
    for line in lines:
        model.load_state_dict(half_way[0])
        optimizer.load_state_dict(half_way[1])
        give_grads(model, AT)
        with contextlib.suppress(InjectedError), at_line(line, fail) as passed:
            optimizer.step()
        if len(passed) <= line:  # threads were faster, and so there were fewer lines of waiting
            continue
        if {int(state["step"]) for state in optimizer.state.values()} == {AT + 1} and not_begun:
            with contextlib.suppress(BrokenStepError):
                goes_on(model, optimizer, line, one_step_on, undisturbed)  # raised when all was done
                continue
        try:
            optimizer.step()
        except BrokenStepError:
            refused += 1
            for use in (optimizer.step, optimizer.state_dict, optimizer.subgroups):
                with pytest.raises(BrokenStepError, match="InjectedError"):
                    use()
            continue
        not_begun += 1
        goes_on(model, optimizer, line, one_step_on, undisturbed)
    assert not_begun > 50
    assert refused > 50


def test_a_signal_before_any_line(
    undisturbed: dict[str, torch.Tensor],
    one_step_on: dict[str, torch.Tensor],
    half_way: tuple[dict[str, Any], dict[str, Any]],
    lines: list[int],
) -> None:
    """The step had not begun, or it is done: its count tells, and both ways the run goes on to the same bits."""

    model, optimizer = resumed(half_way)
    begun, done = 0, 0
    with a_handler_that_raises():
        for line in lines:
            model.load_state_dict(half_way[0])
            optimizer.load_state_dict(half_way[1])
            give_grads(model, AT)
            act = functools.partial(signal.raise_signal, signal.SIGUSR1)
            with contextlib.suppress(KeyboardInterrupt), at_line(line, act) as passed:
                optimizer.step()
            if len(passed) <= line:
                continue
            steps = {int(state["step"]) for state in optimizer.state.values()}
            assert len(steps) == 1, passed[-1]
            if steps == {AT}:
                optimizer.step()
                begun += 1
            else:
                done += 1
            goes_on(model, optimizer, line, one_step_on, undisturbed)
            with pytest.raises(KeyboardInterrupt):  # the job's own handler is in force again
                signal.raise_signal(signal.SIGUSR1)
    assert begun > 50
    assert done > 50


@pytest.mark.parametrize("seed", range(4))
def test_an_interrupt_while_a_root_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, torch.Tensor], seed: int
) -> None:
    """Also while it is a block's second root: no later root comes from another block's statistics."""
    settle, chance = ThreadPool.settle, random.Random(seed)

    def interrupted(pool: ThreadPool, task: Any) -> None:
        if chance.random() < 0.3:
            signal.raise_signal(signal.SIGUSR1)
        settle(pool, task)

    model, optimizer = a_job()
    monkeypatch.setattr(ThreadPool, "settle", interrupted)
    with a_handler_that_raises():
        interrupts = 0
        for step in range(END):
            give_grads(model, step)
            while {int(state["step"]) for state in optimizer.state.values()} == {step}:
                try:
                    optimizer.step()
                except KeyboardInterrupt:
                    interrupts += 1
    assert interrupts > 5
    monkeypatch.undo()
    assert same(everything(model, optimizer), undisturbed)


def test_a_root_that_can_not_be_computed_leaves_the_step_to_be_taken_again(
    monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, torch.Tensor]
) -> None:
    from ds_shampoo.roots import jobs

    solve, broken = jobs.inverse_root, False

    def at_times(*arguments: Any) -> Any:
        if broken:
            raise MemoryError("out of it")
        return solve(*arguments)

    monkeypatch.setattr(jobs, "inverse_root", at_times)
    model, optimizer = a_job()
    failures = 0
    for step in range(END):
        give_grads(model, step)
        broken = step in (3, 4, 8)
        try:
            optimizer.step()
        except WorkerError:
            failures += 1
            broken = False
            optimizer.step()
    assert failures > 0
    assert same(everything(model, optimizer), undisturbed)


def test_what_a_handler_finds_is_a_step_that_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher's SIGTERM that saves finds moments, weights and blocks of the same step, and is called once."""
    update = ShampooPreconditioner.update

    def terminated(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        update(*arguments)

    monkeypatch.setattr(ShampooPreconditioner, "update", terminated)
    model, optimizer = a_job()
    found: list[set[int]] = []
    former = signal.signal(
        signal.SIGTERM, lambda *_: found.append({int(s["step"]) for s in optimizer.state_dict()["state"].values()})
    )
    try:
        train(model, optimizer, range(3))
        assert found == [{1}, {2}, {3}]
    finally:
        signal.signal(signal.SIGTERM, former)


def test_every_handler_is_called_though_one_raises() -> None:
    """Ctrl-C beside a scheduler's warning: the job that catches the first still sees the second."""
    arrived: list[int] = []

    def interrupted(number: int, _: Any) -> None:
        arrived.append(number)
        raise KeyboardInterrupt

    def a_step() -> None:
        with signals_held_back():
            for number in numbers:
                signal.raise_signal(number)

    numbers = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
    former = {number: signal.signal(number, interrupted) for number in numbers}
    try:
        with pytest.raises(KeyboardInterrupt):
            a_step()
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
    assert arrived == list(numbers)
