"""Worker processes of their own: what stands in for CUDA there should not meet the other tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.pool import WorkerPool


@pytest.fixture(scope="package")
def pools() -> Iterator[Callable[[int], WorkerPool]]:
    """As the session's, started at the first use and kept over the tests of this folder."""
    running: dict[int, WorkerPool] = {}

    def pool(world_size: int) -> WorkerPool:
        if world_size not in running or not running[world_size].alive:
            running[world_size] = WorkerPool(world_size)
        return running[world_size]

    yield pool
    for workers in running.values():
        workers.close()
