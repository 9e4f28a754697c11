"""The pretraining program under the real launchers, two ranks, on real text: what a stranger runs first."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from recorder import read_metrics
from tests.launch.ranks import ROOT, launch

CONFIGS = ROOT / "configs"
# By step 9 the roots of all four blocks are in force.
STEPS, HALF = 10, 5

# A very small model; learning starts at step 3, since DeepSpeed's warm-up gives the first two steps rate 0.
SMALL = ["--layers", "1", "--d-model", "32", "--heads", "2", "--context", "32", "--eval-windows", "8"]
SMALL += ["--steps", str(STEPS), "--save-interval", str(HALF), "--eval-interval", str(HALF)]
SMALL += ["--data", str(ROOT / "docs" / "algorithm.md")]


def train(launcher: str, config: Path, runs: Path, *more: object) -> str:
    """A run that has to succeed; returns what it printed."""
    done = launch(launcher, "--deepspeed_config", config, "--runs", runs, *SMALL, *more)
    assert done.returncode == 0, done.stdout
    return done.stdout


def check_finished(run: Path, optimizer: str) -> None:
    """Everything that a run leaves behind is there, and its losses are finite."""
    records = read_metrics(run)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert all(math.isfinite(record["loss"]) for record in records)
    assert [record["step"] for record in records if "val_loss" in record] == [HALF, STEPS]
    assert json.loads((run / "config.json").read_text())["deepspeed"]["optimizer"]["type"] == optimizer
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events.*"))
    assert (run / "checkpoint" / "latest").read_text() == f"global_step{STEPS}"
    if optimizer == "Shampoo":
        assert records[-1]["preconditioned_blocks"] == records[-1]["owned_blocks"] > 0
        assert 0 < records[-1]["root_age_max"] < STEPS
        assert max(record["root_updates"] for record in records) > 0
        assert records[-1]["statistics_ms"] > 0
        assert monitored(run, "Train/Shampoo/root_updates") == [record["root_updates"] for record in records]


def monitored(run: Path, tag: str) -> list[float]:
    """What DeepSpeed's monitor has of a metric, by samples; the last word where a resumed run repeated a step."""
    events = EventAccumulator(str(run / "tensorboard")).Reload().Scalars(tag)
    latest = {event.step: event.value for event in sorted(events, key=lambda event: event.wall_time)}
    return [latest[step] for step in sorted(latest)]


def trajectory(run: Path) -> list[dict[str, Any]]:
    """What a resumed run has to repeat; timings and the counters of one process are left out."""
    repeated = ("step", "loss", "lr", "tokens", "grad_norm", "val_loss", "preconditioned_blocks", "root_age_mean")
    return [{key: record.get(key) for key in repeated} for record in read_metrics(run)]


def cut_short(run: Path, copy: Path) -> Path:
    """As a kill between the two checkpoints would leave the run: steps recorded that no checkpoint has."""
    shutil.copytree(run, copy)
    (copy / "checkpoint" / "latest").write_text(f"global_step{HALF}")
    shutil.rmtree(copy / "checkpoint" / f"global_step{STEPS}")
    return copy


def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path: Path) -> None:
    config = CONFIGS / "gpt_zero2_shampoo.json"
    printed = train("deepspeed", config, tmp_path, "--name", "straight")
    assert "validation loss" in printed
    assert "roots: on 1 host thread of each rank" in printed
    straight = tmp_path / "straight"
    check_finished(straight, "Shampoo")

    resumed = cut_short(straight, tmp_path / "resumed")
    printed = train("torchrun", config, tmp_path, "--name", "resumed")
    assert f"from step {HALF} to {STEPS}" in printed
    check_finished(resumed, "Shampoo")
    assert trajectory(resumed) == trajectory(straight)


@pytest.mark.parametrize(
    ("config", "optimizer"),
    [
        ("gpt_zero0_shampoo", "Shampoo"),
        ("gpt_zero1_bf16_shampoo", "Shampoo"),
        ("gpt_zero2_adamw", "AdamW"),
        ("gpt_muon", "TorchMuon"),
    ],
)
def test_every_configuration_trains(tmp_path: Path, config: str, optimizer: str) -> None:
    train("forks", CONFIGS / f"{config}.json", tmp_path)
    check_finished(tmp_path / config, optimizer)


def test_a_modern_model_of_tokens_resumes_and_is_not_taken_for_another(tmp_path: Path) -> None:
    config = CONFIGS / "gpt_zero2_shampoo.json"
    modern = ["--architecture", "modern", "--vocabulary", "320"]
    printed = train("forks", config, tmp_path, *modern, "--name", "straight")
    assert "BPE of 320 tokens" in printed
    straight = tmp_path / "straight"
    resumed = cut_short(straight, tmp_path / "resumed")

    other = [*SMALL, "--vocabulary", "320", "--name", "resumed"]
    done = launch("forks", "--deepspeed_config", config, "--runs", tmp_path, *other)
    assert done.returncode != 0
    assert "model.architecture = 'modern', this call has 'gpt2'" in done.stdout
    assert "Traceback" not in done.stdout

    printed = train("forks", config, tmp_path, *modern, "--name", "resumed")
    assert f"from step {HALF} to {STEPS}" in printed
    check_finished(resumed, "Shampoo")
    assert trajectory(resumed) == trajectory(straight)
    for record in read_metrics(resumed):
        assert record["loss_per_token"] > 1.2 * record["loss"] > 0
        assert ("val_loss_per_token" in record) == ("val_loss" in record)


def test_an_impossible_model_is_refused(tmp_path: Path) -> None:
    config = CONFIGS / "gpt_zero2_shampoo.json"
    done = launch("torchrun", "--deepspeed_config", config, "--runs", tmp_path, *SMALL, "--mlp", "gated")
    assert done.returncode != 0
    assert "error: --mlp gated is for --architecture modern, not gpt2" in done.stdout
    assert not (tmp_path / config.stem).exists()


def test_a_misspelt_key_is_refused_before_training(tmp_path: Path) -> None:
    config = json.loads((CONFIGS / "gpt_zero2_shampoo.json").read_text())
    config["optimizer"]["params"]["root_intervall"] = config["optimizer"]["params"].pop("root_interval")
    misspelt = tmp_path / "misspelt.json"
    misspelt.write_text(json.dumps(config))
    done = launch("deepspeed", "--deepspeed_config", misspelt, "--runs", tmp_path, *SMALL)
    assert done.returncode != 0
    assert "root_intervall" in done.stdout
    assert "did you mean 'root_interval'" in done.stdout
    assert "Traceback" not in done.stdout
    assert not (tmp_path / "misspelt" / "metrics.jsonl").exists()
