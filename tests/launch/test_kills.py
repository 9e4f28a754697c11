"""Ranks killed at random moments, in the middle of steps and of saves: nothing is lost but the steps since a save."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from recorder import read_metrics
from tests.launch.test_pretrain import CONFIGS, ROOT, launch, trajectory

STEPS, KILLS = 60, 10

# Saved after every step, so that about half of the kills fall into a save.
ARGUMENTS = ["--layers", "1", "--d-model", "32", "--heads", "2", "--context", "32", "--eval-windows", "8"]
ARGUMENTS += ["--steps", str(STEPS), "--save-interval", "1", "--eval-interval", str(STEPS)]
ARGUMENTS += ["--data", str(ROOT / "docs" / "algorithm.md")]
ARGUMENTS += ["--deepspeed_config", str(CONFIGS / "gpt_zero2_shampoo.json")]


def test_kills_at_random_moments(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    done = launch("torchrun", *ARGUMENTS, "--runs", tmp_path, "--name", "straight")
    assert done.returncode == 0, done.stdout
    chance, reached = random.Random(7), 0
    for _ in range(KILLS):
        kill_a_rank(tmp_path, killed, chance)
        latest = killed / "checkpoint" / "latest"
        step = int(latest.read_text().removeprefix("global_step")) if latest.exists() else 0
        assert step >= reached, "a checkpoint that was complete is no longer the latest"
        reached = step
    assert reached > 0
    done = launch("torchrun", *ARGUMENTS, "--runs", tmp_path, "--name", "killed")
    assert done.returncode == 0, done.stdout
    assert f"from step {reached}" in done.stdout or reached == STEPS
    assert trajectory(killed) == trajectory(straight)


def kill_a_rank(runs: Path, run: Path, chance: random.Random) -> None:
    """Starts or resumes the run, and kills one of its ranks some steps later."""
    before = steps_of(run)
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0",
         "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
         str(ROOT / "launch" / "pretrain_gpt.py"), *ARGUMENTS, "--runs", str(runs), "--name", run.name],
        env=uncounted() | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    end = time.monotonic() + 120
    while launcher.poll() is None and time.monotonic() < end and steps_of(run) < before + 2:
        time.sleep(0.02)
    time.sleep(chance.uniform(0.0, 0.4))
    ranks = children(launcher.pid)
    if ranks:
        os.kill(chance.choice(ranks), signal.SIGKILL)
    launcher.wait(timeout=120)


def uncounted() -> dict[str, str]:
    """The environment without coverage's part in it: a kill would leave a file that it can't read."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}


def steps_of(run: Path) -> int:
    return len(read_metrics(run)) if (run / "metrics.jsonl").exists() else 0


def children(pid: int) -> list[int]:
    """The ranks that a launcher has started."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []
