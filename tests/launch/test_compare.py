"""The comparison of runs: when one reached another's final loss, on records made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import compare
from compare import Run, choose_baseline, load_run, reached_training_loss, reached_validation_metric, report


def records(losses: list[float], seconds_per_step: float, validated_every: int = 20) -> list[dict[str, Any]]:
    made = []
    for step, loss in enumerate(losses, start=1):
        record = {"step": step, "loss": loss, "seconds": step * seconds_per_step}
        made.append(record | ({"val_loss": loss + 0.1} if step % validated_every == 0 else {}))
    return made


def falling(steps: int, slope: float) -> list[float]:
    return [5.0 - slope * step for step in range(1, steps + 1)]


# 100 steps: the trailing mean spans 10 of them, so it lags the straight line by 4.5 steps.
BASELINE = Run("adamw", "adamw", records(falling(100, 0.01), 1.0))
TWICE_AS_FAST = Run("shampoo", "shampoo", records(falling(100, 0.02), 1.5))


def write(path: Path, run: Run) -> Path:
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in run.records))
    (path / "config.json").write_text(json.dumps({"deepspeed": {"optimizer": {"type": run.optimizer}}}))
    return path


def test_the_final_loss_is_a_mean_over_the_last_steps() -> None:
    assert BASELINE.final_loss == pytest.approx(5.0 - 0.01 * 95.5)


def test_a_run_with_twice_the_slope_gets_there_in_half_the_steps() -> None:
    reached = reached_training_loss(TWICE_AS_FAST, BASELINE)
    assert reached is not None
    # Mean over steps 43.5 to 52.5 at slope 0.02 equals the mean over steps 91 to 100 at slope 0.01.
    assert reached.steps == 53
    assert reached.of_steps == pytest.approx(0.53)
    assert reached.of_seconds == pytest.approx(53 * 1.5 / 100)


def test_validation_is_compared_at_the_points_where_it_was_measured() -> None:
    reached = reached_validation_metric(TWICE_AS_FAST, BASELINE)
    assert reached is not None
    assert reached.steps == 60, "level at step 50, first measured at 60"


def test_a_run_that_never_got_there_is_said_to_have_never_got_there() -> None:
    slow = Run("slow", "sgd", records(falling(100, 0.001), 1.0))
    assert reached_training_loss(slow, BASELINE) is None
    assert reached_validation_metric(slow, BASELINE) is None
    assert "never" in report([BASELINE, slow], BASELINE)


def test_a_run_too_short_for_the_mean_never_got_there() -> None:
    short = Run("short", "sgd", records([0.0] * 9, 1.0))
    assert reached_training_loss(short, BASELINE) is None


@pytest.mark.parametrize(
    ("types", "chosen"),
    [(("shampoo", "adamw"), 1), (("adamw", "shampoo"), 0), (("shampoo", "sgd"), 0), (("adam", "adamw"), 0)],
)
def test_the_baseline_is_the_only_adam_or_the_first(types: tuple[str, str], chosen: int) -> None:
    runs = [Run(kind, kind, BASELINE.records) for kind in types]
    assert choose_baseline(runs) is runs[chosen]


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "run", BASELINE)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "lo')
    assert [record["step"] for record in load_run(path).records] == list(range(1, 101))


def test_the_program_draws_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shampoo, adamw = write(tmp_path / "shampoo", TWICE_AS_FAST), write(tmp_path / "adamw", BASELINE)
    picture = tmp_path / "out" / "compare.png"
    assert compare.main([str(shampoo), str(adamw), "--output", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "Where adamw ended" in printed
    assert "step 53 = 0.53 x its steps" in printed


def test_the_baseline_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shampoo, adamw = write(tmp_path / "shampoo", TWICE_AS_FAST), write(tmp_path / "adamw", BASELINE)
    arguments = [str(adamw), "--baseline", str(shampoo), "--output", str(tmp_path / "compare.png")]
    assert compare.main(arguments) == 0
    assert "Where shampoo ended" in capsys.readouterr().out


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([str(tmp_path)]) == 1
    assert f"{tmp_path}: not the folder of a run" in capsys.readouterr().err
