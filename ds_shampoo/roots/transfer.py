"""Copies between an accelerator and the host that the training stream does not wait for, in buffers used again."""

from __future__ import annotations

import weakref
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ds_shampoo.roots.native import allow_calls_beside_captures


@dataclass(frozen=True, slots=True)
class HostCopy:
    """A host buffer, and the device event after which it may be read or written; None where no device is involved."""

    tensor: Tensor
    event: Any = None

    def wait(self) -> Tensor:
        """The buffer, once the device is through with it; blocks the calling thread alone."""
        if self.event is not None:
            self.event.synchronize()
        return self.tensor


class _Kind(NamedTuple):
    """What buffers of one kind share."""

    shape: torch.Size
    dtype: torch.dtype


def _kind(tensor: Tensor) -> _Kind:
    return _Kind(tensor.shape, tensor.dtype)


class Transfers:
    """The copies of one device. On a CPU they are plain copies; elsewhere buffers are pinned.

    Snapshots are taken on a side stream. What they read must not be overwritten before `fence`, which makes the
    training stream wait for them on the device, and costs the host nothing.

    A buffer belongs to whoever refers to it. One that is not given back is freed as soon as nobody refers to it: a
    thread that was given up and still reads it, say. So no way out of a step can lose one.
    """

    def __init__(self, device: torch.device) -> None:
        self._module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._side: Any = self._module.Stream(device) if self._module else None
        # By shape and dtype, and apart by who writes them: the device writes snapshots, worker threads write results.
        self._snapshots: dict[_Kind, list[HostCopy]] = defaultdict(list)
        self._results: dict[_Kind, list[HostCopy]] = defaultdict(list)
        self._sizes: dict[weakref.ref[Tensor], int] = {}

    @property
    def bytes(self) -> int:
        """Held in buffers, those in use and those waiting to be used again."""
        return sum(list(self._sizes.values()))

    def reserve(self, source: Tensor) -> HostCopy:
        """A buffer for `snapshot` of such a tensor, which then has no memory to ask for."""
        return self._taken(self._snapshots, _kind(source))

    def snapshot(self, source: Tensor, reserved: HostCopy | None = None) -> HostCopy:
        """Copies a device tensor to the host, behind what the training stream has been given so far.

        Args:
            reserved: the buffer to be used, if `reserve` gave one.
        """
        buffer = (reserved or self.reserve(source)).tensor
        if self._side is None:
            buffer.copy_(source)
            return HostCopy(buffer)
        self._side.wait_stream(self._module.current_stream(self._side.device))
        with self._module.stream(self._side):
            buffer.copy_(source, non_blocking=True)
            event = self._event()
            event.record(self._side)
        source.record_stream(self._side)
        return HostCopy(buffer, event)

    def from_saved(self, values: Tensor) -> HostCopy:
        """A snapshot that comes out of a checkpoint, wherever that was loaded to, in a buffer that `release` takes."""
        buffer = self._taken(self._snapshots, _kind(values)).tensor
        buffer.copy_(values)
        return HostCopy(buffer)

    def fence(self) -> None:
        """Has the training stream wait, on the device, until all snapshots are taken."""
        if self._side is not None:
            self._module.current_stream(self._side.device).wait_stream(self._side)

    def result(self, values: Tensor, dtype: torch.dtype) -> HostCopy:
        """A host tensor, rounded to `dtype`, in a buffer that `install` can take; for worker threads."""
        buffer = self._taken(self._results, _Kind(values.shape, dtype)).tensor
        buffer.copy_(values)
        return HostCopy(buffer)

    def install(self, result: HostCopy, target: Tensor) -> None:
        """Copies a result over a device tensor of its dtype, in the training stream's order; takes its buffer back."""
        target.copy_(result.tensor, non_blocking=True)
        event = None
        if self._module is not None:
            event = self._event()
            event.record(self._module.current_stream(target.device))
        self.discard(HostCopy(result.tensor, event))

    def discard(self, result: HostCopy) -> None:
        """Takes back the buffer of a result that is not needed any more."""
        self._results[_kind(result.tensor)].append(result)

    def release(self, snapshot: HostCopy) -> None:
        """Takes back the buffer of a snapshot that nobody reads any more."""
        self._snapshots[_kind(snapshot.tensor)].append(snapshot)

    def bind_thread(self) -> None:
        """Has the calling thread mean this device: a worker that waits for it must not open another."""
        if self._side is not None:
            self._module.set_device(self._side.device)
            allow_calls_beside_captures()

    def _event(self) -> Any:
        """One at which a host thread sleeps until the device is there; CUDA's would have it spin."""
        return self._module.Event(blocking=True) if self._side.device.type == "cuda" else self._module.Event()

    def _taken(self, free: dict[_Kind, list[HostCopy]], kind: _Kind) -> HostCopy:
        """A free buffer, which nothing on the device uses any more, or a new one."""
        try:
            found = free[kind].pop()
        except IndexError:
            return HostCopy(self._new(kind))
        found.wait()
        return HostCopy(found.tensor)

    def _new(self, kind: _Kind) -> Tensor:
        pinned = self._module is not None
        buffer = torch.empty(kind.shape, dtype=kind.dtype, device="cpu", pin_memory=pinned)
        # The reference takes itself out when the buffer goes; in C, where no interrupt can get lost.
        self._sizes[weakref.ref(buffer, self._sizes.pop)] = buffer.nbytes
        return buffer
