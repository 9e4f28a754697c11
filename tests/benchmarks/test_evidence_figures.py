"""The evidence's arithmetic, on runs made by hand."""

from __future__ import annotations

import math

import pytest

from benchmarks.evidence.figures import (
    Crossing,
    Sigma,
    Spread,
    crossing,
    difference,
    first_as_good,
    levels,
    shown,
    sigma_of,
    within,
    z_of,
)
from benchmarks.evidence.jobs import Result
from tests.benchmarks.evidence_runs import ACCURACY, FIRST, LOSS, SECOND, ended, sloping


def test_two_schedules_are_joined_by_the_logarithm_of_steps() -> None:
    baselines = [ended(FIRST, 2.0)]
    runs = [ended(SECOND, 1.9, horizon=1.0), ended(SECOND, 2.1, horizon=0.64)]
    found = crossing(levels(runs, baselines, None), 2.0)
    assert (found.kind, found.steps) == ("at", pytest.approx(0.8))
    # Its steps take three seconds, the baseline's one.
    assert found.seconds == pytest.approx(2.4)


@pytest.mark.parametrize(
    ("finals", "expected"),
    [
        ({1.0: 2.1, 1.3: 2.05}, Crossing("above", 1.3, 3.9)),
        ({1.0: 1.9, 0.8: 1.95, 0.6: 2.0}, Crossing("below", 0.6, 1.8)),
        ({1.0: 1.9, 0.8: math.nan}, Crossing("at", 1.0, 3.0)),
        ({1.0: 2.0, 0.8: 2.1}, Crossing("at", 1.0, 3.0)),
        ({1.3: 1.9, 1.0: 2.1}, Crossing("at", math.sqrt(1.3), 3 * math.sqrt(1.3))),
    ],
)
def test_what_lies_beyond_all_schedules_or_diverged_is_told(finals: dict[float, float], expected: Crossing) -> None:
    runs = [ended(SECOND, final, horizon=horizon) for horizon, final in finals.items()]
    found = crossing(levels(runs, [ended(FIRST, 2.0)], None), 2.0)
    assert found.kind == expected.kind
    assert (found.steps, found.seconds) == pytest.approx((expected.steps, expected.seconds))


def test_a_better_that_is_higher_is_judged_so() -> None:
    baselines = [ended(FIRST, 0.5, metric=ACCURACY)]
    runs = [ended(SECOND, 0.6, horizon=1.0, metric=ACCURACY), ended(SECOND, 0.4, horizon=0.64, metric=ACCURACY)]
    found = levels(runs, baselines, None)
    assert crossing(found, -0.5).steps == pytest.approx(0.8)
    assert [level.reached for level in found] == [1, 0]


def test_a_level_says_how_many_seeds_are_as_good_as_the_baseline_s_median() -> None:
    baselines = [ended(FIRST, final, seed) for seed, final in enumerate((1.9, 2.0, 2.2))]
    runs = [ended(SECOND, final, seed) for seed, final in enumerate((2.0, 2.05, 1.8))]
    (level,) = levels(runs, baselines, None)
    assert (level.reached, level.seeds, level.ends, level.score, level.z) == (2, 3, (2.0, 2.05, 1.8), 2.0, None)


def test_sigma_is_pooled_within_contenders_and_schedules() -> None:
    runs = [ended(FIRST, final, seed) for seed, final in enumerate((1.0, 3.0))]
    runs += [ended(SECOND, final, seed, horizon=0.5) for seed, final in enumerate((10.0, 14.0))]
    runs += [ended(SECOND, 20.0), ended(FIRST, math.nan, 2)]
    assert sigma_of(runs) == Sigma(math.sqrt((2 + 8) / 2), 2)
    assert sigma_of(runs[:1]) is None


def test_z_is_of_two_means_that_are_both_uncertain() -> None:
    baselines = [ended(FIRST, 2.0, seed) for seed in range(3)]
    runs = [ended(SECOND, 1.9, seed) for seed in range(3)]
    assert z_of(runs, baselines, Sigma(0.03, 10)) == pytest.approx(0.1 / (0.03 * math.sqrt(2 / 3)))
    assert z_of(runs[:1], baselines, Sigma(0.03, 10)) == pytest.approx(0.1 / (0.03 * math.sqrt(4 / 3)))
    higher = ([ended(each, final, metric=ACCURACY)] for each, final in ((SECOND, 0.6), (FIRST, 0.5)))
    assert z_of(*higher, Sigma(0.1, 1)) == pytest.approx(1 / math.sqrt(2))
    assert z_of([ended(SECOND, math.nan)], baselines, Sigma(0.03, 10)) == -math.inf
    assert z_of(runs, baselines, None) is None


def test_what_is_shown_is_shown_on_every_longer_schedule_too() -> None:
    baselines, sigma = [ended(FIRST, 2.0, seed) for seed in range(2)], Sigma(0.1, 5)

    def sure(finals: dict[float, float]) -> float | None:
        runs = [ended(SECOND, final, seed, horizon=h) for h, final in finals.items() for seed in range(2)]
        found = shown(levels(runs, baselines, sigma))
        return None if found is None else found.horizon

    # 3 standard errors are 0.3 here.
    assert sure({1.0: 1.5, 0.9: 1.69, 0.8: 1.71}) == 0.9
    assert sure({1.0: 1.71, 0.9: 1.5}) is None


@pytest.mark.parametrize("metric", [LOSS, ACCURACY])
def test_within_one_run_it_is_where_the_baseline_s_end_was_reached(metric: object) -> None:
    found = within([sloping(SECOND, 0.02, metric=metric)], [sloping(FIRST, 0.01, metric=metric)])
    assert (found.steps, found.seconds) == (Spread(0.5, 0.5, 0.5), Spread(1.5, 1.5, 1.5))


def test_a_validation_that_comes_late_counts_late() -> None:
    # It gets there at step 34 and is validated at step 40.
    assert first_as_good(sloping(SECOND, 0.03), sloping(FIRST, 0.01).final) == (40, 120.0)


def test_the_median_is_over_seeds_and_each_is_compared_with_its_own_baseline() -> None:
    baselines = [sloping(FIRST, slope, seed) for seed, slope in enumerate((0.01, 0.02, 0.01))]
    runs = [sloping(SECOND, 0.02, seed) for seed in range(3)]
    assert within(runs, baselines).steps == Spread(0.5, 0.5, 1.0)


def test_a_seed_that_never_got_there_is_told_with_where_each_ends() -> None:
    baselines = [sloping(FIRST, 0.01, seed) for seed in range(2)]
    found = within([sloping(SECOND, 0.02, 0), sloping(SECOND, 0.001, 1)], baselines)
    assert (found.steps, found.reached, found.seeds, found.ends) == (None, 1, 2, (8.0, 9.9))


def test_a_baseline_that_was_there_before_its_end_counts_from_then() -> None:
    baseline = sloping(FIRST, 0.01)
    for record in baseline.records[69::10]:  # from step 70 on it is no better than it ends
        record["val_loss"] = baseline.final
    found = within([sloping(SECOND, 0.02)], [baseline])
    assert found.steps == Spread(50 / 70, 50 / 70, 50 / 70)
    assert found.seconds == Spread(150 / 70, 150 / 70, 150 / 70)


def test_ends_are_compared_seed_by_seed() -> None:
    baselines = [sloping(FIRST, slope, seed) for seed, slope in enumerate((0.01, 0.05, 0.03))]
    runs = [sloping(SECOND, slope, seed) for seed, slope in enumerate((0.011, 0.049, 0.03))]
    found = difference(runs, baselines[::-1])
    assert (found.median, found.least, found.most) == pytest.approx((0.0, -0.1, 0.1))


def test_a_run_that_diverged_is_worse_than_any() -> None:
    for metric in (LOSS, ACCURACY):
        gone: Result = ended(SECOND, math.nan, metric=metric)
        assert gone.score == math.inf
        assert math.isnan(gone.final)
    assert math.isnan(Spread.of([1.0, math.nan, 0.0]).median)
