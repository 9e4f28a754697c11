"""The programs in examples/ as they are, at two ranks: from the beginning, and on from what they saved."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.pool import WorkerPool
from tests.trainers.fresh import EXAMPLES, example

Pools = Callable[[int], WorkerPool]

PROGRAMS = sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "text.py")


def result(output: str) -> tuple[float, int]:
    found = re.search(r"validation loss ([\d.]+); the first rank preconditions (\d+) blocks", output)
    assert found is not None, output
    return float(found[1]), int(found[2])


@pytest.mark.parametrize("program", PROGRAMS)
def test_it_runs_and_goes_on(pools: Pools, tmp_path: Path, program: str) -> None:
    first, other = pools(2).run(example, program, "--output", str(tmp_path), "--steps", "4")
    loss, blocks = result(first)
    assert "validation loss" not in other
    assert blocks > 0
    longer, *_ = pools(2).run(example, program, "--output", str(tmp_path), "--steps", "8", "--resume")
    assert result(longer)[0] < loss
    assert result(longer)[1] >= blocks


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "accelerate"])
def test_launchers(tmp_path: Path, launcher: str) -> None:
    """Each of them starts the example that names it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    program = {"deepspeed": "hf_trainer.py", "torchrun": "accelerate_loop.py", "accelerate": "peft_lora.py"}[launcher]
    command = {
        "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port", port],
        "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", port],
        "accelerate": ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", port],
    }[launcher]
    flags = ["--output", str(tmp_path), "--steps", "4"]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [*command, str(EXAMPLES / program), *flags], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert result(done.stdout)[1] > 0
