"""A pool of worker processes that form one process group and run functions together, test after test.

The workers of all pools are forked off one process that has imported DeepSpeed: each import takes seconds of a core.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NoReturn

# Far more than any job takes, even on a busy machine; a collective that some rank never enters hangs for ever.
_TIMEOUT_S = 240.0

# What is not installed is passed over. None of this package is here: coverage counts what the forks import of it.
_IMPORTED_ONCE = [
    "deepspeed", "megatron.core.models.bert", "megatron.core.models.gpt", "pytest", "torch.utils.tensorboard",
]  # fmt: skip


class WorkerError(AssertionError):
    """A function failed or hung on some rank; the message has its traceback and the last lines of its output."""


class WorkerPool:
    """`world_size` processes with gloo and DeepSpeed initialised."""

    def __init__(self, world_size: int) -> None:
        self.alive = True
        self._folder = tempfile.TemporaryDirectory(prefix="ds-shampoo-workers-")
        context = forks()
        self._workers = []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, port, theirs, self._log(rank), dict(os.environ)), daemon=True
            )
            process.start()
            self._workers.append((process, ours))

    def run(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
        """Runs a module-level function on every rank at once; returns the ranks' results in order.

        Raises:
            WorkerError: if it raises anywhere or does not return in time; the pool is then not to be used again.
        """
        for _, connection in self._workers:
            connection.send((function.__module__, function.__qualname__, arguments, named))
        pending = {connection: rank for rank, (_, connection) in enumerate(self._workers)}
        sentinels = {process.sentinel: rank for rank, (process, _) in enumerate(self._workers)}
        results = [None] * len(self._workers)
        deadline = time.monotonic() + _TIMEOUT_S
        while pending:
            ready = wait([*pending, *sentinels], timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail(f"ranks {sorted(pending.values())} did not answer within {_TIMEOUT_S:.0f} s", 0)
            for item in ready:
                if item not in pending:
                    self._fail(f"rank {sentinels[item]} died", sentinels[item])
                rank = pending.pop(item)
                good, results[rank] = item.recv()
                if not good:  # the others may wait for it in a collective: nobody is waited for any more
                    self._fail(f"rank {rank}:\n{results[rank]}", rank)
        return results

    def close(self) -> None:
        """Lets the workers end by themselves, so that what coverage has to write gets written."""
        for _, connection in self._workers:
            with contextlib.suppress(OSError):
                connection.send(None)
        for process, _ in self._workers:
            process.join(30)
            if process.is_alive():
                process.kill()
                process.join()
        self.alive = False
        self._folder.cleanup()

    def _fail(self, reason: str, rank: int) -> NoReturn:
        output = self._log(rank).read_text(errors="replace")[-3000:] if self._log(rank).exists() else ""
        for process, _ in self._workers:
            process.kill()
        self.close()
        raise WorkerError(f"{reason}\n--- its output ends with:\n{output}")

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name) / f"rank{rank}.log"


@contextlib.contextmanager
def worker_pools() -> Iterator[Callable[[int], WorkerPool]]:
    """`pool(world_size)`: started at the first use, and again if it was lost; all of them closed in the end."""
    running: dict[int, WorkerPool] = {}

    def pool(world_size: int) -> WorkerPool:
        if world_size not in running or not running[world_size].alive:
            running[world_size] = WorkerPool(world_size)
        return running[world_size]

    try:
        yield pool
    finally:
        for workers in running.values():
            workers.close()


def forks() -> ForkServerContext:
    """Makes processes that begin with `_IMPORTED_ONCE` imported."""
    context = get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    counting = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("COVERAGE_")}
    try:
        forkserver.ensure_running()  # uncounted: it would write its data when everybody else is gone
    finally:
        os.environ.update(counting)
    return context


def _serve(
    rank: int, world_size: int, port: int, connection: Connection, log: Path, environment: dict[str, str]
) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(
        environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    with _counted() if rank == 0 else contextlib.nullcontext():  # it takes time
        _answer(connection)


@contextlib.contextmanager
def _counted() -> Iterator[None]:
    """Counted by coverage, where the environment says so: a fork neither begins nor ends as that expects."""
    if "COVERAGE_PROCESS_CONFIG" not in os.environ:
        yield
        return
    import coverage

    count = coverage.process_startup()
    yield
    count.stop()
    count.save()


def _answer(connection: Connection) -> None:
    import deepspeed
    import torch
    from deepspeed.accelerator import get_accelerator

    gc.freeze()  # DeepSpeed collects garbage with every engine, and looks at a million objects of imports each time
    torch.set_num_threads(1)
    # DeepSpeed asks the CPU for fast fp16 arithmetic; torch computes it on every CPU, and speed is not the matter.
    get_accelerator().is_fp16_supported = lambda: True
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    while (message := connection.recv()) is not None:
        module, name, arguments, named = message
        try:
            function = getattr(importlib.import_module(module), name)
            connection.send((True, function(*arguments, **named)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
    torch.distributed.destroy_process_group()
