"""Ranks killed at random moments, in the middle of steps and of saves: nothing is lost but the steps since a save."""

from __future__ import annotations

import random
import time
from pathlib import Path

from recorder import read_metrics
from tests.launch.ranks import ROOT, launch, start, stop
from tests.launch.test_pretrain import CONFIGS, trajectory

STEPS, KILLS = 60, 10

# Saved after every step, so that about half of the kills fall into a save.
ARGUMENTS = ["--layers", "1", "--d-model", "32", "--heads", "2", "--context", "32", "--eval-windows", "8"]
ARGUMENTS += ["--steps", str(STEPS), "--save-interval", "1", "--eval-interval", str(STEPS)]
ARGUMENTS += ["--data", str(ROOT / "docs" / "algorithm.md")]
ARGUMENTS += ["--deepspeed_config", str(CONFIGS / "gpt_zero2_shampoo.json")]


def test_kills_at_random_moments(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    done = launch("forks", *ARGUMENTS, "--runs", tmp_path, "--name", "straight")
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
    ranks = start("pretrain_gpt.py", 2, [*ARGUMENTS, "--runs", str(runs), "--name", run.name], runs / "output")
    end = time.monotonic() + 120
    while all(rank.is_alive() for rank in ranks) and time.monotonic() < end and steps_of(run) < before + 2:
        time.sleep(0.02)
    time.sleep(chance.uniform(0.0, 0.4))
    chance.choice(ranks).kill()
    stop(ranks, 0.1)  # how often torchrun looks after its ranks


def steps_of(run: Path) -> int:
    return len(read_metrics(run)) if (run / "metrics.jsonl").exists() else 0
