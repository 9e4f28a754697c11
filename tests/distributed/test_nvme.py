"""Offload of the optimizer to NVMe; only where libaio is there (apt-get install libaio-dev)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deepspeed.ops.op_builder import AsyncIOBuilder

from tests.distributed import jobs
from tests.distributed.jobs import SHAMPOO, engine_config
from tests.distributed.pool import WorkerPool

pytestmark = pytest.mark.skipif(not AsyncIOBuilder().is_compatible(), reason="libaio is not here")

# DeepSpeed leaves what is below 1 MiB in memory: the model has to be wide.
WIDTH = 256
SETTINGS = {**SHAMPOO, "block_size": 128}


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """Has DeepSpeed compile what it reads and writes with, which takes minutes, before workers wait for it."""
    AsyncIOBuilder().load()


def alone(job: Callable[..., Any], config: dict[str, Any], *arguments: Any) -> list[Any]:
    """A job in processes of its own: DeepSpeed names its files by a counter of the process."""
    pool = WorkerPool(2)
    try:
        return pool.run(jobs.widened, WIDTH, job, config, *arguments)
    finally:
        pool.close()


def on_nvme(folder: Path, **zero: Any) -> dict[str, Any]:
    offload = {"device": "nvme", "nvme_path": str(folder), "buffer_count": 5}
    return engine_config(SETTINGS, 3, 2, zero={**zero, "offload_optimizer": offload})


def test_it_follows_and_resumes_the_run_in_memory_bit_for_bit(tmp_path: Path) -> None:
    zero = {"sub_group_size": 400_000}
    in_memory = alone(jobs.job, engine_config(SETTINGS, 3, 2, zero=zero), 9)
    config, folder = on_nvme(tmp_path / "nvme", **zero), str(tmp_path / "checkpoint")
    straight = alone(jobs.saving, config, folder, 5, 9)
    resumed = alone(jobs.loading, config, folder, 5, 9)
    for memory, disk, again in zip(in_memory, straight, resumed, strict=True):
        assert np.array_equal(memory.end, disk.end)
        assert np.array_equal(memory.end, again.end)
        assert memory.losses[5:] == disk.losses == again.losses
    assert sum(trace.extra["in_force"] for trace in resumed) > 0


def test_a_part_that_stays_in_memory_is_refused_when_loading(tmp_path: Path) -> None:
    config, folder = on_nvme(tmp_path / "nvme", sub_group_size=100_000), str(tmp_path / "checkpoint")
    alone(jobs.saving, config, folder, 2, 2)
    for message, untouched in alone(jobs.failing_to_load, config, folder):
        assert "is too small for NVMe" in message
        assert untouched
