"""Runs a function on the ranks of a data-parallel job, each a process with one thread, and gathers what it returns."""

from __future__ import annotations

import logging
import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """The results of a module-level function by rank; DeepSpeed's process group is up while it runs.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of the first rank that raised.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_serve, (world_size, port, folder, function, arguments), nprocs=world_size)
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(world_size)]


def _serve(
    rank: int, world_size: int, port: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "KINETO_LOG_LEVEL": "5",  # the profiler that counts allocations tells when it starts and stops
    }
    torch.set_num_threads(1)
    logging.disable(logging.INFO)  # DeepSpeed tells much at start
    import deepspeed

    deepspeed.init_distributed(verbose=False)
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(function(*arguments)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
