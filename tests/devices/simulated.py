"""A simulated asynchronous device: who reads and writes which memory, and what of it is ordered by what.

Tensors of the device hold their values in host memory, and every operation computes at once. What is simulated is
order: streams and host threads have vector clocks, which events, waits, locks and synchronisation carry from one to
another. Two accesses to the same bytes of which one is a write, neither ordered before the other, are a race, whatever
the values were. Rules are CUDA's and those of torch's allocators:

- an operation goes behind all that its stream was given before, and behind what the host thread had done till then;
- a copy to the host with `non_blocking` is the stream's, and the host may read it only after waiting for it;
- a copy from pinned host memory with `non_blocking` is the stream's; one from other memory has read it on return;
- any other copy between host and device has the host wait for the current stream;
- memory that is given back may be given out again at once to the stream that it was made on: other streams that still
  use it must be known through `record_stream`.

Stood in for: the device module (`torch.privateuseone`, torch's name for devices from outside), its tensors, and those
parts of `threading` by which the package hands work from thread to thread, which carry clocks here. Its hand-overs
without locks carry clocks too: tasks and free buffers. All else is real.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from tests.devices.carrying import Threading, carry_work
from tests.devices.streams import DEVICE, Actor, DeviceModule, Stream, join

# What needs the device's values on the host.
_READ_BY_THE_HOST = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero"}
# What takes a tensor for its shape alone.
_NOT_READING = {
    f"aten::{name}"
    for how in ("empty", "zeros", "ones", "full", "rand", "randn")
    for name in (f"{how}_like", f"new_{how}", "new_empty_strided")
}


@dataclass(frozen=True)
class Access:
    """A read or write of some bytes of one piece of memory."""

    begin: int
    end: int
    actor: Actor
    time: int
    writes: bool
    what: str

    def __str__(self) -> str:
        return f"{'write' if self.writes else 'read'} by {self.what} on {self.actor.name}"


class Memory:
    """One storage: its unordered accesses, and for device memory the stream that it belongs to."""

    def __init__(self, simulation: Simulation, owner: Actor | None, pinned: bool = False) -> None:
        self.simulation, self.owner, self.pinned = simulation, owner, pinned
        self.accesses: list[Access] = []
        self.recorded: set[int] = set()

    def touch(self, new: Access) -> None:
        kept = []
        for old in self.accesses:
            if old.end <= new.begin or new.end <= old.begin:
                kept.append(old)
                continue
            ordered = new.actor.clock.get(old.actor.number, 0) >= old.time
            if not ordered and (old.writes or new.writes):
                self.simulation.race(f"{new} is not ordered after the {old}")
            covered = new.begin <= old.begin and old.end <= new.end
            if not (ordered and covered and (new.writes or not old.writes)):
                kept.append(old)
        self.accesses = [*kept, new]

    def __del__(self) -> None:
        """What torch's caching allocator does: the next to get it is work of the stream that it belongs to."""
        if self.owner is None:
            return
        with self.simulation.lock:
            clock = dict(self.owner.clock)
            join(clock, self.simulation.thread().clock)
            for old in self.accesses:
                if clock.get(old.actor.number, 0) < old.time and old.actor.number not in self.recorded:
                    self.simulation.race(f"memory is given back before the {old} is over")


class SimTensor(Tensor):
    """A tensor of the simulated device: `raw` has its values, `memory` its storage's accesses."""

    raw: Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, raw: Tensor, memory: Memory) -> SimTensor:
        made: SimTensor = Tensor._make_wrapper_subclass(
            cls, raw.shape, strides=raw.stride(), storage_offset=raw.storage_offset(), dtype=raw.dtype, device=DEVICE
        )
        made.raw, made.memory = raw, memory
        return made

    def record_stream(self, stream: Any) -> None:
        self.memory.recorded.add(stream.actor.number)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """For threads in which no mode is in force."""
        found = next(a for a in tree_flatten((args, kwargs))[0] if isinstance(a, SimTensor))
        return found.memory.simulation.run(func, args, kwargs or {})


class Simulation:
    """The device, the host's threads, and the races seen so far.

    Attributes:
        races: what was not ordered, each with the lines of the package that led there.
        syncs: how often a host thread waited for all of its stream, by thread's name.
        waits: how often one waited for an event that it didn't know to be over, likewise.
        launches: operations that streams were given, by name.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.races: list[str] = []
        self.syncs: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()
        self._local = threading.local()
        self._threads: list[Actor] = []
        self._host: dict[int, tuple[Tensor, Memory]] = {}  # by address; kept, so that no address is used twice
        self.default = Stream(self, name="training stream")

    def race(self, message: str) -> None:
        lines = [
            f"{f.filename.rpartition('/')[2]}:{f.lineno}"
            for f in traceback.extract_stack()
            if "ds_shampoo/" in f.filename
        ]
        self.races.append(f"{message} (at {' > '.join(lines)})")

    def thread(self) -> Actor:
        """The calling host thread."""
        if not hasattr(self._local, "actor"):
            self._local.actor = Actor(threading.current_thread().name)
        found: Actor = self._local.actor
        return found

    @property
    def stream(self) -> Stream:
        """The calling thread's current stream."""
        return getattr(self._local, "stream", self.default)

    @stream.setter
    def stream(self, stream: Stream) -> None:
        self._local.stream = stream

    def wait_for(self, clock: Mapping[int, int]) -> None:
        """The calling thread goes on when all of that has happened."""
        with self.lock:
            join(self.thread().clock, clock)

    def sync(self) -> None:
        """The calling thread waits for its current stream."""
        self.syncs[self.thread().name] += 1
        self.wait_for(self.stream.actor.clock)

    @contextlib.contextmanager
    def followed(self) -> Iterator[None]:
        """Has the calling thread's operations seen: those on the device, and those on host memory that it shares."""
        with _Constructor(), _Mode(self):
            yield

    def follow_thread(self) -> None:
        """Has the calling thread's operations on host memory seen from now on."""
        if not hasattr(self._local, "modes"):
            self._local.modes = _Constructor(), _Mode(self)
            for mode in self._local.modes:  # for as long as the thread lives
                mode.__enter__()

    def on_device(self, values: Tensor) -> SimTensor:
        """A new tensor of the current stream."""
        return SimTensor(values, Memory(self, self.stream.actor))

    def track_host(self, tensor: Tensor, pinned: bool) -> None:
        self._host[tensor.untyped_storage().data_ptr()] = (tensor, Memory(self, None, pinned))

    def host_memory(self, tensor: Tensor) -> Memory | None:
        """That of a host tensor which the device may access by itself."""
        found = self._host.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
        return None if found is None else found[1]

    def access(self, tensor: Tensor, actor: Actor, writes: bool, what: str) -> None:
        """One that `actor` makes at its present; of host memory, where the device may access it."""
        raw, memory = (tensor.raw, tensor.memory) if isinstance(tensor, SimTensor) else (tensor, None)
        memory = memory or self.host_memory(raw)
        if memory is None or not raw.numel():
            return
        begin = raw.storage_offset() * raw.itemsize
        extent = 1 + sum((size - 1) * stride for size, stride in zip(raw.shape, raw.stride(), strict=True))
        memory.touch(Access(begin, begin + extent * raw.itemsize, actor, actor.clock[actor.number], writes, what))

    def begin(self, on_device: bool) -> Actor:
        """The actor of an operation that the calling thread issues now, at its new present."""
        thread = self.thread()
        thread.tick()
        if not on_device:
            return thread
        stream = self.stream.actor
        join(stream.clock, thread.clock)
        stream.tick()
        return stream

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation, of whichever side."""
        with self.lock:
            name = func._schema.name
            if name == "aten::copy_":
                return self._copy(*args, **kwargs)
            if name == "aten::_to_copy":
                return self._to_copy(args[0], kwargs)
            if name == "aten::is_pinned":
                memory = self.host_memory(args[0])
                return memory is not None and memory.pinned
            return self._compute(func, name, args, kwargs)

    def _copy(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        to_device, from_device = isinstance(target, SimTensor), isinstance(source, SimTensor)
        actor = self.begin(to_device or from_device)
        if from_device and not to_device and non_blocking and self.host_memory(target) is None:
            self.track_host(target, pinned=False)
        reader = actor
        if to_device and not from_device:
            memory = self.host_memory(source)
            reader = actor if memory is not None and memory.pinned else self.thread()
        self.access(source, reader, False, "copy_")
        self.access(target, actor, True, "copy_")
        if to_device or from_device:
            self.launches["copy_"] += 1
        _raw(target).copy_(_raw(source))
        if to_device != from_device and not non_blocking:
            self.sync()
        return target

    def _to_copy(self, source: Tensor, kwargs: dict[str, Any]) -> Tensor:
        device = kwargs.pop("device", None) or source.device
        non_blocking = kwargs.pop("non_blocking", False)
        kwargs.pop("pin_memory", None)
        layout = kwargs.get("memory_format") or torch.preserve_format
        plain = torch.empty_like(_raw(source), dtype=kwargs.get("dtype") or source.dtype, memory_format=layout)
        target = self.on_device(plain) if device.type == DEVICE.type else plain
        return self._copy(target, source, non_blocking)

    def _compute(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        device = kwargs.get("device")
        leaves, spec = tree_flatten((args, kwargs))
        sims = [leaf for leaf in leaves if isinstance(leaf, SimTensor)]
        others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, SimTensor)]
        makes = torch.device(device).type == DEVICE.type if device is not None else bool(sims)
        if sims and any(other.dim() for other in others):
            raise RuntimeError(f"{name}: tensors of the device and of the host in one operation")
        pinned = bool(kwargs.get("pin_memory"))
        view = bool(sims or others) and _is_view(func)
        actor = self.begin(makes or bool(sims))
        if not view and name not in _NOT_READING:
            if sims or makes:
                self.launches[name.removeprefix("aten::")] += 1
            for tensor, writes in _accesses(func, args, kwargs):
                self.access(tensor, actor, writes, name)
        plain_args, plain_kwargs = tree_unflatten([_raw(leaf) for leaf in leaves], spec)
        if device is not None:
            plain_kwargs["device"] = torch.device("cpu")
        plain_kwargs.pop("pin_memory", None)
        found = func(*plain_args, **plain_kwargs)
        if name in _READ_BY_THE_HOST and sims:
            self.sync()
        if pinned:
            self.track_host(found, pinned=True)
        if not makes or name == "aten::_local_scalar_dense":
            return found
        return tree_map(lambda value: self._wrapped(value, sims) if isinstance(value, Tensor) else value, found)

    def _wrapped(self, raw: Tensor, inputs: list[SimTensor]) -> SimTensor:
        for tensor in inputs:
            if raw is tensor.raw:
                return tensor
        for tensor in inputs:
            if raw.untyped_storage().data_ptr() == tensor.raw.untyped_storage().data_ptr() and raw.numel():
                return SimTensor(raw, tensor.memory)
        made = self.on_device(raw)
        self.access(made, self.stream.actor, True, "its making")
        return made


@contextlib.contextmanager
def simulated_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulation]:
    """A device that torch and the package take for a real one, in the calling thread and in the package's."""
    if not hasattr(torch._C, "_acc"):
        pytest.skip("this torch lets nobody name a device from Python")
    simulation = _MODULE.simulation = Simulation()
    _guard()
    monkeypatch.setattr(torch, "privateuseone", _MODULE, raising=False)
    monkeypatch.setitem(sys.modules, "torch.privateuseone", _MODULE)
    carrying = Threading(simulation)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("ds_shampoo.") and hasattr(module, "threading"):
            monkeypatch.setattr(module, "threading", carrying)
    carry_work(monkeypatch, carrying)
    with simulation.followed():
        yield simulation


@functools.cache
def _guard() -> None:
    """What torch asks of a device before it indexes: there is one, and it is current."""

    class Guard(torch._C._acc.DeviceGuard):
        def type_(self) -> Any:
            return torch._C._autograd.DeviceType.PrivateUse1

    torch._C._acc.register_python_privateuseone_device_guard(Guard())


def _raw(value: Any) -> Any:
    return value.raw if isinstance(value, SimTensor) else value


def _is_view(func: Any) -> bool:
    """An operation whose result lies in its argument's memory, and that touches nothing of it."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _accesses(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[Tensor, bool]]:
    """Every tensor among an operation's arguments, and whether it is written."""
    for number, argument in enumerate(func._schema.arguments):
        value = args[number] if number < len(args) else kwargs.get(argument.name)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        for leaf in tree_flatten(value)[0]:
            if isinstance(leaf, Tensor):
                yield leaf, writes


class _Mode(TorchDispatchMode):
    def __init__(self, simulation: Simulation) -> None:
        super().__init__()
        self._simulation = simulation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._simulation.run(func, args, dict(kwargs or {}))


class _Constructor(TorchFunctionMode):
    """`torch.tensor` is made on the host and copied, as on CUDA; torch's own way there shows no mode the copy."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == DEVICE.type:
            return func(*args, **{**kwargs, "device": "cpu"}).to(kwargs["device"])
        return func(*args, **kwargs)


_MODULE = DeviceModule()
