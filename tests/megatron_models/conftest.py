"""Worker processes of their own: what stands in for CUDA there should not meet the other tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.distributed.pool import WorkerPool, worker_pools


@pytest.fixture(scope="package")
def pools() -> Iterator[Callable[[int], WorkerPool]]:
    """As the session's, started at the first use and kept over the tests of this folder."""
    with worker_pools() as pool:
        yield pool
