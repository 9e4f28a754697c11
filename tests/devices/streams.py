"""The simulated device's streams and events, and the clocks by which they tell what happened before what."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from tests.devices.simulated import Simulation

DEVICE = torch.device("privateuseone", 0)

Clock = dict[int, int]


def join(into: Clock, other: Mapping[int, int]) -> None:
    for actor, time in other.items():
        into[actor] = max(into.get(actor, 0), time)


class Actor:
    """A stream or a host thread, and what happened before its present."""

    _numbers = iter(range(10**9))

    def __init__(self, name: str) -> None:
        self.number = next(self._numbers)
        self.name = name
        self.clock: Clock = {self.number: 0}

    def tick(self) -> int:
        self.clock[self.number] += 1
        return self.clock[self.number]


class Stream:
    """A queue of the device."""

    device = DEVICE

    def __init__(self, simulation: Simulation, name: str = "side stream") -> None:
        self._simulation = simulation
        self.actor = Actor(name)

    def wait_event(self, event: Event) -> None:
        with self._simulation.lock:
            join(self.actor.clock, event.clock)

    def wait_stream(self, other: Stream) -> None:
        with self._simulation.lock:
            join(self.actor.clock, other.actor.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self._simulation)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._simulation.wait_for(self.actor.clock)


class Event:
    """What a stream had done when it came by; nothing, before it is recorded, as in CUDA."""

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        with self._simulation.lock:
            stream = stream or self._simulation.stream
            join(stream.actor.clock, self._simulation.thread().clock)
            self.clock = dict(stream.actor.clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._simulation.stream).wait_event(self)

    def synchronize(self) -> None:
        if not self.query():
            self._simulation.waits[self._simulation.thread().name] += 1
        self._simulation.wait_for(self.clock)

    def query(self) -> bool:
        """Over only if the thread knows it: what is under way lasts for ever otherwise."""
        own = self._simulation.thread().clock
        return all(own.get(actor, 0) >= time for actor, time in self.clock.items())

    def elapsed_time(self, end: Event) -> float:
        return 1.0


class DeviceModule:
    """What `torch.get_device_module` gives for the device, and remembers."""

    simulation: Simulation

    def Stream(self, device: Any = None, priority: int = 0) -> Stream:  # noqa: N802
        return Stream(self.simulation)

    def Event(self, enable_timing: bool = False, blocking: bool = False) -> Event:  # noqa: N802
        return Event(self.simulation)

    def current_stream(self, device: Any = None) -> Stream:
        return self.simulation.stream

    def default_stream(self, device: Any = None) -> Stream:
        return self.simulation.default

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.simulation.stream = self.simulation.stream, stream
        try:
            yield
        finally:
            self.simulation.stream = before

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        """The first thing that a thread of the package does: from here on its work is followed."""
        self.simulation.follow_thread()

    def synchronize(self, device: Any = None) -> None:
        self.simulation.sync()
