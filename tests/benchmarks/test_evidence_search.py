"""Coordinate descent: where it goes, what it spends, and that trials are of equal number."""

from __future__ import annotations

import math

import pytest

from benchmarks.evidence.search import Axis, Descent, Settings

RATE, MOMENTUM = Axis("lr", (1.0, 2.0, 4.0, 8.0, 16.0)), Axis("momentum", (0.8, 0.9, 0.95))
START = {"lr": 4.0, "momentum": 0.9, "fixed": "yes"}


class Bowl:
    """A score with one least place, and what was asked of it."""

    def __init__(self, lr: float, momentum: float) -> None:
        self.lr, self.momentum = lr, momentum
        self.asked: list[tuple[object, object]] = []

    def __call__(self, settings: Settings) -> float:
        assert settings["fixed"] == "yes"
        self.asked.append((settings["lr"], settings["momentum"]))
        rate, momentum = float(settings["lr"]), float(settings["momentum"])  # type: ignore[arg-type]
        return abs(math.log2(rate / self.lr)) + 10 * abs(momentum - self.momentum)


@pytest.mark.parametrize(("lr", "momentum"), [(16.0, 0.8), (1.0, 0.95), (4.0, 0.9)])
def test_it_goes_to_the_least_place(lr: float, momentum: float) -> None:
    bowl = Bowl(lr, momentum)
    best = Descent((RATE, MOMENTUM), START, 12, bowl).run()
    assert (best["lr"], best["momentum"], best["fixed"]) == (lr, momentum, "yes")


def test_a_line_is_gone_up_while_that_improves_and_else_down() -> None:
    bowl = Bowl(1.0, 0.9)
    Descent((RATE,), START, 4, bowl).run()
    assert [lr for lr, _ in bowl.asked] == [4.0, 8.0, 2.0, 1.0]
    bowl = Bowl(8.0, 0.9)
    Descent((RATE,), START, 3, bowl).run()
    assert [lr for lr, _ in bowl.asked] == [4.0, 8.0, 16.0]


@pytest.mark.parametrize("budget", [1, 2, 5, 17])
def test_the_budget_is_spent_on_different_settings(budget: int) -> None:
    for bowl in (Bowl(4.0, 0.9), Bowl(16.0, 0.8), Bowl(3.0, 0.87)):
        best = Descent((RATE, MOMENTUM), START, budget, bowl).run()
        assert len(bowl.asked) == len(set(bowl.asked)) == budget
        scores = {
            place: Bowl(bowl.lr, bowl.momentum)(dict(START, lr=place[0], momentum=place[1])) for place in bowl.asked
        }
        assert scores[best["lr"], best["momentum"]] == min(scores.values())


def test_what_converged_goes_on_between_the_values() -> None:
    bowl = Bowl(2.83, 0.9)
    best = Descent((RATE,), START, 8, bowl).run()
    assert best["lr"] == 2.83


def test_finer_is_halfway_by_ratio_and_from_zero_by_difference() -> None:
    assert Axis("lr", (1.0, 4.0, 16.0)).finer().values == (1.0, 2.0, 4.0, 8.0, 16.0)
    assert Axis("warmup", (0.0, 0.1, 0.4)).finer().values == (0.0, 0.05, 0.1, 0.2, 0.4)
    for axis in (Axis("interval", (1, 5)), Axis("grafting", ("adam", "rows")), Axis("lr", (1.0, 1.001))):
        assert axis.finer() == axis


def test_axes_that_can_not_become_finer_end_it() -> None:
    asked = []

    def score(settings: Settings) -> float:
        asked.append(settings["interval"])
        return 1.0

    Descent((Axis("interval", (1, 5)),), {"interval": 1}, 10, score).run()
    assert asked == [1, 5]


def test_a_start_between_the_values_has_them_as_neighbours() -> None:
    bowl = Bowl(3.0, 0.9)
    best = Descent((RATE,), {**START, "lr": 3.0}, 3, bowl).run()
    assert best["lr"] == 3.0
    assert [lr for lr, _ in bowl.asked] == [3.0, 4.0, 2.0]
    with pytest.raises(AssertionError, match="grafting: 'none' is none of"):
        Axis("grafting", ("adam", "rows")).around("none")


def test_what_diverged_is_never_chosen() -> None:
    def score(settings: Settings) -> float:
        return math.inf if float(settings["lr"]) >= 4 else float(settings["lr"])  # type: ignore[arg-type]

    assert Descent((RATE,), START, 3, score).run()["lr"] == 2.0
    assert Descent((RATE,), START, 2, score).run()["lr"] == 4.0, "nothing tried came to its end"
