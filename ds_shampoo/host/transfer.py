"""Copies between an accelerator and the host that the training stream does not wait for, in buffers used again."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


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

    Attributes:
        bytes: held in buffers, those in use and those waiting to be used again.
    """

    def __init__(self, device: torch.device) -> None:
        self._module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._side: Any = self._module.Stream(device) if self._module else None
        # By shape and dtype, and apart by who writes them: the device writes snapshots, worker threads write results.
        self._snapshots: dict[_Kind, list[HostCopy]] = defaultdict(list)
        self._results: dict[_Kind, list[HostCopy]] = defaultdict(list)
        self.bytes = 0
        self._counting = threading.Lock()

    def snapshot(self, source: Tensor) -> HostCopy:
        """Copies a tensor to the host, behind what the training stream has been given so far."""
        buffer = self._buffer(self._snapshots, _kind(source))
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

    def fence(self) -> None:
        """Has the training stream wait, on the device, until all snapshots are taken."""
        if self._side is not None:
            self._module.current_stream(self._side.device).wait_stream(self._side)

    def result(self, values: Tensor, dtype: torch.dtype) -> HostCopy:
        """A host tensor, rounded to `dtype`, in a buffer that `install` can take; for worker threads."""
        buffer = self._buffer(self._results, _Kind(values.shape, dtype))
        buffer.copy_(values)
        return HostCopy(buffer)

    def install(self, result: HostCopy, target: Tensor) -> None:
        """Copies a result over a device tensor of its dtype, in the training stream's order; takes its buffer back."""
        target.copy_(result.tensor, non_blocking=True)
        event = None
        if self._module is not None:
            event = self._event()
            event.record(self._module.current_stream(target.device))
        self._results[_kind(result.tensor)].append(HostCopy(result.tensor, event))

    def release(self, snapshot: HostCopy) -> None:
        """Takes back the buffer of a snapshot that nobody reads any more."""
        self._snapshots[_kind(snapshot.tensor)].append(snapshot)

    def abandon(self, snapshot: HostCopy) -> None:
        """Gives up the buffer of a snapshot that a lost thread may still read."""
        with self._counting:
            self.bytes -= snapshot.tensor.nbytes

    def bind_thread(self) -> None:
        """Has the calling thread mean this device: a worker that waits for it must not open another."""
        if self._side is not None:
            self._module.set_device(self._side.device)

    def _event(self) -> Any:
        """One at which a host thread sleeps until the device is there; CUDA's would have it spin."""
        return self._module.Event(blocking=True) if self._side.device.type == "cuda" else self._module.Event()

    def _buffer(self, free: dict[_Kind, list[HostCopy]], kind: _Kind) -> Tensor:
        try:
            return free[kind].pop().wait()
        except IndexError:
            buffer = torch.empty(kind.shape, dtype=kind.dtype, pin_memory=self._module is not None)
            with self._counting:
                self.bytes += buffer.nbytes
            return buffer
