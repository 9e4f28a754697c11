"""Programs of launch/ on CPU ranks: under a real launcher, or on forks that need not import anew what takes seconds."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests.distributed.pool import forks

ROOT = Path(__file__).resolve().parents[2]
ON_CPU = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

_TIMEOUT_S = 300.0
# For the other ranks to say what they have to say, when one has failed; torchrun gives them as long.
_LAST_WORDS_S = 30.0


def launch(
    launcher: str, *arguments: object, program: str = "pretrain_gpt.py", ranks: int = 2
) -> subprocess.CompletedProcess[str]:
    """Runs a program on CPU ranks with `deepspeed`, `torchrun` or `forks`, output and errors in `stdout`.

    `forks` is for what a program does itself: each rank is a process of its own with the environment and the
    arguments that `deepspeed` gives it, and runs the file from its first line to its end.
    """
    given = [str(argument) for argument in arguments]
    if launcher == "forks":
        return _forked(program, ranks, given)
    programs = Path(sys.executable).parent
    count = {"deepspeed": "--num_gpus", "torchrun": "--nproc_per_node"}[launcher]
    return subprocess.run(
        [str(programs / launcher), count, str(ranks), "--master_port", str(_free_port()),
         str(ROOT / "launch" / program), *given],
        cwd=ROOT,
        env=os.environ | ON_CPU,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_TIMEOUT_S,
    )  # fmt: skip


def start(program: str, ranks: int, arguments: list[str], log: Path) -> list[ForkServerProcess]:
    """Forks that run a program as the ranks of one job; the output of all goes to `log`."""
    port, context = str(_free_port()), forks()
    started = []
    for rank in map(str, range(ranks)):
        environment = ON_CPU | {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(ranks), "LOCAL_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        arguments_of_rank = [f"--local_rank={rank}", *arguments]
        process = context.Process(
            target=_run, args=(ROOT / "launch" / program, arguments_of_rank, dict(os.environ) | environment, log)
        )
        process.start()
        started.append(process)
    return started


def stop(processes: list[ForkServerProcess], patience_s: float) -> None:
    """As a launcher ends a job of which a rank has failed."""
    end = time.monotonic() + patience_s
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()


def _forked(program: str, ranks: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory(prefix="ds-shampoo-ranks-") as folder:
        log = Path(folder) / "output"
        processes = start(program, ranks, arguments, log)
        running, end = {process.sentinel: process for process in processes}, time.monotonic() + _TIMEOUT_S
        while running and all(process.exitcode in (None, 0) for process in processes):
            ready = wait(list(running), timeout=max(0.0, end - time.monotonic()))
            if not ready:
                break
            for sentinel in ready:
                running.pop(sentinel).join()
        late = time.monotonic() >= end
        stop(processes, 0.0 if late else _LAST_WORDS_S)
        output = log.read_text(errors="replace")
    if late:
        raise subprocess.TimeoutExpired([program, *arguments], _TIMEOUT_S, output)
    code = next((process.exitcode for process in processes if process.exitcode), 0)
    return subprocess.CompletedProcess([program, *arguments], code, output)


def _run(program: Path, arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """A rank's whole life."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server of forks ignores it
    gc.freeze()  # of the imports' objects none is garbage
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [str(program), *arguments]
    sys.path.insert(0, str(program.parent))
    try:
        runpy.run_path(str(program), run_name="__main__")
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        atexit._run_exitfuncs()  # a fork ends without


def _free_port() -> int:
    """Below those that systems give away by themselves: seconds pass until rank 0 listens, and nobody takes it then."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port
