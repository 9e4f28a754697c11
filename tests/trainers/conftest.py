"""The real libraries, where they are installed (`make trainers-test`), in worker processes of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import WorkerPool, worker_pools

MISSING = [name for name in ("transformers", "accelerate", "lightning", "peft", "trl") if find_spec(name) is None]


class WithoutItsLibraries(pytest.Module):
    """A file of tests that can't even be imported here."""

    def collect(self) -> Any:
        pytest.skip(f"{', '.join(MISSING)} not installed: make trainers-test installs them")


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return WithoutItsLibraries.from_parent(parent, path=module_path) if MISSING else None


@pytest.fixture(scope="package")
def pools() -> Iterator[Callable[[int], WorkerPool]]:
    """As the session's: what the libraries leave in a process should not meet the other tests."""
    with worker_pools() as pool:
        yield pool
