"""Trials of directions: that a prototype is what its name says, and that a trial is decided by its settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.directions import __main__ as program
from benchmarks.directions import trial as trials
from benchmarks.directions.formulas import inverse_root, polar
from benchmarks.directions.trial import Trial, carry_out
from ds_shampoo.algorithm.orthogonal import CUBIC_FROM, CUBIC_STEPS, flatten_spectrum, orthogonalize

TINY = {"layers": 1, "d_model": 32, "heads": 2, "context": 32, "tokens": 256, "steps": 6, "warmup": 2, "block": 32}


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A corpus of the name that it gives."""
    (tmp_path / "words.txt").write_text(" ".join(f"{number} is {number * number}" for number in range(2000)))
    monkeypatch.setattr(trials, "DATA", tmp_path)
    monkeypatch.setattr(trials, "VALIDATION_WINDOWS", 16)
    return "words.txt"


def losses(text: str, **settings: Any) -> list[float]:
    return list(carry_out(Trial(text=text, **{**TINY, **settings}))["curve"].values())


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 40), (2, 40, 16)], ids=str)
def test_polar_factors_are_the_packages(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    cubic, quintic = torch.empty_like(x), torch.empty_like(x)
    flatten_spectrum(x.clone(), cubic)
    orthogonalize(x.clone(), quintic)
    torch.testing.assert_close(polar(x, "cubic", CUBIC_STEPS, CUBIC_FROM), cubic)
    torch.testing.assert_close(polar(x, "quintic", 5, 0.0), quintic)


def test_roots_are_inverse() -> None:
    rows = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(0))
    factors = rows @ rows.mT
    root = inverse_root(factors, 0.5, 0.0)
    torch.testing.assert_close(root @ factors @ root, torch.eye(8).expand(2, 8, 8), atol=1e-4, rtol=0)


def test_one_micro_batch_is_the_mean_whatever_its_sign(text: str) -> None:
    plain = losses(text, direction="polar", micro=1)
    assert losses(text, direction="polar", micro=1, statistics="signed") == plain
    # Clipped after the products and not before: rounding, which roots of a few gradients' statistics enlarge.
    assert losses(text, direction="polar", micro=1, statistics="micro") == pytest.approx(plain, abs=1e-3)


def test_statistics_of_micro_batches_are_others_than_the_means(text: str) -> None:
    found = {
        statistics: losses(text, direction="polar", micro=4, statistics=statistics)[-1]
        for statistics in ("mean", "micro", "noise", "signed", "centred", "difference", "tokens")
    }
    assert len(set(found.values())) == len(found)


@pytest.mark.parametrize("direction", ["muon", "adam", "shampoo", "polar", "spectral", "ds:polar", "ds:shampoo"])
def test_every_direction_learns(text: str, direction: str) -> None:
    curve = losses(text, direction=direction, micro=2, steps=30)
    assert curve[-1] < curve[0] - 0.3


def test_the_command_line_makes_all_combinations_and_refuses_what_is_no_setting() -> None:
    made = program.parse(["direction=polar,muon", "lr=0.01,0.02", "early=False"])
    assert [(t.direction, t.lr, t.early) for t in made] == [
        *(("polar", 0.01, False), ("polar", 0.02, False), ("muon", 0.01, False), ("muon", 0.02, False))
    ]
    with pytest.raises(ValueError, match="rate: the keys are"):
        program.parse(["rate=1"])


def test_the_table_has_a_row_for_all_seeds_of_a_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {
            "settings": {"seed": seed, "lr": lr, "direction": "muon"},
            "loss": loss,
            "optimizer_seconds": 2.0,
            "commit": "abc",
        }
        for seed, lr, loss in ((1, 0.02, 1.5), (0, 0.02, 1.7), (0, 0.01, 1.9))
    ]
    results = tmp_path / "directions.jsonl"
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    program.print_table(program.read(results))
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| 1.6000 | 0: 1.7000, 1: 1.5000 | 2 | abc | direction=muon lr=0.02 |",
        "| 1.9000 | 0: 1.9000 | 2 | abc | direction=muon |",
    ]
