"""What carries clocks from one host thread to another: locks, and the package's hand-overs that need none."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from ds_shampoo.roots.tasks import Task
from ds_shampoo.roots.transfer import Transfers
from tests.devices.streams import Clock, join

if TYPE_CHECKING:
    from tests.devices.simulated import Simulation


class Threading:
    """`threading`, with locks, conditions, events and threads that carry clocks from one thread to another."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation

        class Carrier:
            def __init__(self) -> None:
                self.clock: Clock = {}

            def publish(self) -> None:
                with simulation.lock:
                    join(self.clock, simulation.thread().clock)

            def take(self) -> None:
                simulation.wait_for(self.clock)

        class Condition(threading.Condition):
            def __init__(self, lock: Any = None) -> None:
                super().__init__(threading.RLock() if lock is None else lock)
                self.carrier = Carrier()

            def __enter__(self) -> bool:
                entered = super().__enter__()
                self.carrier.take()
                return entered

            def __exit__(self, *error: Any) -> None:
                self.carrier.publish()
                super().__exit__(*error)

            def wait(self, timeout: float | None = None) -> bool:
                self.carrier.publish()
                try:
                    return super().wait(timeout)
                finally:
                    self.carrier.take()

        class Lock:
            def __init__(self, make: Any = threading.Lock) -> None:
                self._lock, self.carrier = make(), Carrier()

            def acquire(self, *arguments: Any, **named: Any) -> bool:
                taken: bool = self._lock.acquire(*arguments, **named)
                if taken:
                    self.carrier.take()
                return taken

            def release(self) -> None:
                self.carrier.publish()
                self._lock.release()

            def __enter__(self) -> bool:
                return self.acquire()

            def __exit__(self, *error: Any) -> None:
                self.release()

            def __getattr__(self, name: str) -> Any:
                return getattr(self._lock, name)

        class Event(threading.Event):
            def __init__(self) -> None:
                super().__init__()
                self.carrier = Carrier()

            def set(self) -> None:
                self.carrier.publish()
                super().set()

            def is_set(self) -> bool:
                if not super().is_set():
                    return False
                self.carrier.take()
                return True

            def wait(self, timeout: float | None = None) -> bool:
                return super().wait(timeout) and self.is_set()

        class Thread(threading.Thread):
            def start(self) -> None:
                self.carrier = Carrier()
                self.carrier.publish()
                super().start()

            def run(self) -> None:
                self.carrier.take()
                super().run()
                self.carrier.publish()

            def join(self, timeout: float | None = None) -> None:
                super().join(timeout)
                if not self.is_alive():
                    self.carrier.take()

        self.Condition, self.Lock, self.Event, self.Thread = Condition, Lock, Event, Thread
        self.RLock = lambda: Lock(threading.RLock)
        self.Carrier = Carrier

    def __getattr__(self, name: str) -> Any:
        return getattr(threading, name)


def carry_work(monkeypatch: pytest.MonkeyPatch, carrying: Threading) -> None:
    """Work goes from thread to thread in attributes and lists, which CPython changes one after the other.

    Who takes a task on has seen what was done before it was made; who sees that it is done, what was done before that;
    and who takes a free buffer, what was done before it was given back.
    """

    def after(owner: type, name: str, act: Callable[[Any, Any], None]) -> None:
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def wrapped(self: Any, *arguments: Any, **named: Any) -> Any:
            found = plain(self, *arguments, **named)
            act(self, found)
            return found

        monkeypatch.setattr(owner, name, wrapped)

    def before(owner: type, name: str, act: Callable[[Any], None]) -> None:
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def wrapped(self: Any, *arguments: Any, **named: Any) -> Any:
            act(self)
            return plain(self, *arguments, **named)

        monkeypatch.setattr(owner, name, wrapped)

    def carrier(owner: Any) -> Any:
        return owner.__dict__.setdefault("carrier", carrying.Carrier())

    is_done = Task.done.fget
    assert is_done is not None

    def done(task: Any) -> bool:
        if not is_done(task):
            return False
        carrier(task).take()
        return True

    after(Task, "__init__", lambda task, _: carrier(task).publish())
    before(Task, "finish", lambda task: carrier(task).publish())
    before(Task, "solve", lambda task: carrier(task).take())
    monkeypatch.setattr(Task, "done", property(done))
    for given_back in ("release", "discard"):
        before(Transfers, given_back, lambda transfers: carrier(transfers).publish())
    before(Transfers, "install", lambda transfers: carrier(transfers).publish())
    before(Transfers, "_taken", lambda transfers: carrier(transfers).take())
