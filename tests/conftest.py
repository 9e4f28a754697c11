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
# Triton looks at it when it is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# As when the environment is activated: another ninja than its own builds DeepSpeed's ops once more, for minutes.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
sys.path[:0] = [str(ROOT), str(ROOT / "launch")]

from leftovers import buffers, extensions_folder, remove_stale, unlocking  # noqa: E402
from tests.distributed.pool import WorkerPool, worker_pools  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def shared_memory() -> Iterator[None]:
    """DeepSpeed's CPU collective leaves 66 MB in shared memory for every rank that ever ran; not so these tests.

    Ranks that still run, those of other tests on this machine too, keep theirs: one that is just being set up waits
    for ever for a buffer that is taken away.
    """
    before = set(buffers())
    yield
    remove_stale(set(buffers()) - before)


@pytest.fixture(scope="session", autouse=True)
def no_stale_locks() -> Iterator[None]:
    """A worker or a program that was killed while it loaded an op leaves a lock: nobody waits for it for ever."""
    with unlocking(extensions_folder()):
        yield


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], WorkerPool]]:
    """`pools(world_size)`: processes that form a gloo group, started at the first use and kept over all tests."""
    with worker_pools() as pool:
        yield pool
