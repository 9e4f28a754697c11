"""The click-through task: what of a flight is used, how columns are numbered, and the area under the curve."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from dlrm.data import CATEGORICAL, NUMERIC, FlightsError, load_flights
from dlrm.model import DLRM, DLRMConfig
from dlrm.task import BINS, DLRMTask, area_under_curve, histogram

COLUMNS = (
    *("year", "month", "day", "dep_time", "sched_dep_time", "dep_delay", "arr_time", "sched_arr_time", "arr_delay"),
    *("carrier", "flight", "tailnum", "origin", "dest", "air_time", "distance", "hour", "minute", "time_hour"),
)
# Known only once the flight has left.
LATER = ("dep_time", "dep_delay", "arr_time", "air_time")


def write_flights(folder: Path, rows: int = 200, **changes: str) -> Path:
    """A table of the right shape whose flights are late when they are UA's."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    with (folder / "flights.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        for number in range(rows):
            carrier = ("UA", "AA", "DL")[rng.integers(3)]
            row = dict.fromkeys(COLUMNS, "1") | {
                "year": "2013", "month": str(rng.integers(1, 13)), "day": str(rng.integers(1, 29)),
                "sched_dep_time": "2355", "sched_arr_time": "110", "carrier": carrier,
                "arr_delay": "NA" if number % 10 == 0 else "40" if carrier == "UA" else "-5",
            }  # fmt: skip
            table.writerow(row | changes)
    return folder


def test_nothing_that_is_known_only_later_is_used(tmp_path: Path) -> None:
    plain = load_flights(write_flights(tmp_path / "plain"))
    later = load_flights(write_flights(tmp_path / "later", **dict.fromkeys(LATER, "777")))
    assert np.array_equal(plain.train.numeric, later.train.numeric)
    assert np.array_equal(plain.train.categorical, later.train.categorical)
    assert not set(LATER) & {*CATEGORICAL, *NUMERIC}


def test_flights_without_an_arrival_are_left_out_and_the_rest_is_split(tmp_path: Path) -> None:
    flights = load_flights(write_flights(tmp_path))
    assert len(flights.train) + len(flights.validation) == 180
    assert len(flights.validation) == 27
    ua = flights.train.categorical[:, CATEGORICAL.index("carrier")] == 3  # AA, DL, UA
    assert np.array_equal(ua, flights.train.labels == 1)


def test_a_duration_goes_on_past_midnight(tmp_path: Path) -> None:
    flights = load_flights(write_flights(tmp_path))
    # All are alike, so that the standardised column is zero; a negative one would have been as well, hence the parts.
    assert np.allclose(flights.train.numeric[:, NUMERIC.index("duration")], 0)


def test_a_value_that_training_never_saw_is_number_zero(tmp_path: Path) -> None:
    flights = load_flights(write_flights(tmp_path, rows=40))
    date = CATEGORICAL.index("date")
    seen = set(flights.train.categorical[:, date])
    assert min(seen) == 1
    assert max(seen) == flights.cardinalities[date] - 1
    assert set(flights.validation.categorical[:, date]) - seen <= {0}
    assert 0 in flights.validation.categorical[:, date]


@pytest.mark.parametrize("content", ["", "year,month\n2013,1\n", None])
def test_another_table_is_refused_by_name(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "flights.csv").write_text(content)
    with pytest.raises(FlightsError, match=r"flights\.csv"):
        load_flights(tmp_path)


def test_the_area_under_the_curve_is_the_share_of_ordered_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    positive = torch.randn(300, generator=generator) + 0.7
    negative = torch.randn(500, generator=generator)
    pairs = positive[:, None] - negative[None, :]
    exact = ((pairs > 0).double() + 0.5 * (pairs == 0)).mean().item()
    # Pairs within one bin count half: at most one in BINS / 8 of them where scores spread over an eighth of the bins.
    assert area_under_curve(histogram(positive), histogram(negative)) == pytest.approx(exact, abs=8 / BINS)
    assert area_under_curve(histogram(positive), histogram(positive)) == pytest.approx(0.5)


@torch.no_grad()
def test_the_sums_of_batches_give_the_metrics_of_all_rows(tmp_path: Path) -> None:
    task = DLRMTask(load_flights(write_flights(tmp_path)))
    torch.manual_seed(0)
    model = task.model()
    whole = task.validation_batch(0)
    parts = [tuple(t[part] for t in whole) for part in (slice(0, 10), slice(10, None))]
    found = task.summary(sum(task.measure(model, part) for part in parts))
    assert found == pytest.approx(task.summary(task.measure(model, whole)))
    assert found["val_loss"] == pytest.approx(model(*whole).item(), rel=1e-6)


def test_every_pair_of_columns_is_multiplied_once() -> None:
    model = DLRM(DLRMConfig(numeric=3, cardinalities=(5, 7, 11), embedding=4))
    first = model.top[0]
    assert first.in_features == 4 + 6
    assert len({tuple(pair) for pair in model.pairs.T.tolist()}) == 6
    assert all(left != right for left, right in model.pairs.T.tolist())
