"""Host buffers: who has them, that they are used again, and that all of them are counted."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from torch import nn

from ds_shampoo import Shampoo
from ds_shampoo.algorithm.inverse_roots import InverseRoot, inverse_root
from ds_shampoo.roots import jobs
from ds_shampoo.roots.transfer import Transfers

CPU = torch.device("cpu")


def test_buffers_are_used_again_and_counted_while_anyone_has_them() -> None:
    transfers, source = Transfers(CPU), torch.randn(6)
    copy = transfers.snapshot(source)
    assert torch.equal(copy.wait(), source)
    assert transfers.bytes == 24
    first = copy.tensor.data_ptr()
    transfers.release(copy)
    del copy
    again = transfers.snapshot(source, transfers.reserve(source))
    assert again.tensor.data_ptr() == first
    kept = again.tensor  # as a thread has it that was given up
    del again
    assert transfers.bytes == 24
    del kept
    assert transfers.bytes == 0


def test_results_are_used_again() -> None:
    transfers, target = Transfers(CPU), torch.zeros(3, 3, dtype=torch.bfloat16)
    for _ in range(3):
        transfers.install(transfers.result(torch.ones(3, 3, dtype=torch.float64), torch.bfloat16), target)
        transfers.discard(transfers.result(torch.ones(3, 3, dtype=torch.float64), torch.bfloat16))
    assert transfers.bytes == 18
    assert bool((target == 1).all())


def test_what_a_checkpoint_has_is_not_copied_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    transfers = Transfers(CPU)
    monkeypatch.setattr(transfers, "_side", object())  # a stream on which nothing may be done
    values = torch.randn(5)
    copy = transfers.from_saved(values)
    assert copy.event is None
    assert torch.equal(copy.wait(), values)
    assert copy.tensor is not values


SETTINGS: dict[str, Any] = {"lr": 0.01, "block_size": 8, "root_interval": 4, "root_delay": 3, "root_threads": 2}


def trained(steps: int) -> Shampoo:
    params = [nn.Parameter(torch.randn(16, 12, generator=torch.Generator().manual_seed(i))) for i in range(2)]
    optimizer = Shampoo(params, **SETTINGS)
    step(optimizer, range(steps))
    return optimizer


def step(optimizer: Shampoo, steps: range) -> None:
    for number in steps:
        for param in optimizer.param_groups[0]["params"]:
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(number))
        optimizer.step()


def test_loading_again_and_again_takes_no_more_memory() -> None:
    optimizer, held = trained(10), []
    for _ in range(12):
        optimizer.load_state_dict(optimizer.state_dict())
        step(optimizer, range(10, 15))
        gc.collect()
        held.append(optimizer.metrics()["snapshot_bytes"])
    assert 0 < max(held) <= 2 * held[0]  # which varies with what the threads had begun


def test_loads_while_threads_are_busy_take_what_the_threads_have(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, main = threading.Event(), threading.main_thread()

    def stuck(*arguments: Any) -> InverseRoot:
        if threading.current_thread() is not main:
            gate.wait()
        return inverse_root(*arguments)

    optimizer = trained(8)
    usual = optimizer.metrics()["snapshot_bytes"]
    monkeypatch.setattr(jobs, "inverse_root", stuck)
    step(optimizer, range(8, 9))
    state = optimizer.state_dict()
    for _ in range(10):
        optimizer.load_state_dict(state)
    largest = max(factor[0].nbytes for factor in next(iter(optimizer._groups.values())).stacks[0].factors)
    # What was queued is used again; each of the two threads may still have the snapshot of its first job.
    assert optimizer.metrics()["snapshot_bytes"] <= 2 * usual + 2 * largest
    gate.set()
    step(optimizer, range(9, 20))
    assert optimizer.metrics()["roots_failed"] == 0
