"""What all tests share: CPU ranks of one thread, and worker processes that live as long as the session."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Before torch or DeepSpeed is imported, here and in every worker that inherits the environment.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
sys.path.insert(0, str(ROOT))

from tests.distributed.pool import WorkerPool, worker_pools  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def shared_memory() -> Iterator[None]:
    """DeepSpeed's CPU collective leaves 66 MB in shared memory for every rank that ever ran; not so these tests.

    Ranks that still run have theirs mapped, and keep it.
    """

    def buffers() -> set[Path]:
        return set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"))

    before = buffers()
    yield
    for buffer in buffers() - before:
        buffer.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], WorkerPool]]:
    """`pools(world_size)`: processes that form a gloo group, started at the first use and kept over all tests."""
    with worker_pools() as pool:
        yield pool
