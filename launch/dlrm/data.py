"""Flights that left New York in 2013: what was known before departure, and whether they arrived late."""

from __future__ import annotations

import csv
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

# Late by more than this many minutes counts as positive: 23.7 per cent of the flights.
LATE = 15

# Everything that is known only after departure stays out: dep_time, dep_delay, arr_time, arr_delay, air_time.
CATEGORICAL = ("carrier", "flight", "tailnum", "origin", "dest", "hour", "date", "weekday")
NUMERIC = ("distance", "sched_dep", "sched_arr", "duration", "day_of_year")

# The part of the rows that is held out, at random.
HELD_OUT = 0.15
_SPLIT_SEED = 2013
_MINUTES_A_DAY = 24 * 60


class FlightsError(ValueError):
    """A table that can't be read; the message names the file."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Samples of click-through kind.

    Attributes:
        numeric: float32 [n, len(NUMERIC)], of mean 0 and variance 1 over the training rows.
        categorical: int64 [n, len(CATEGORICAL)], numbers of each column's values; 0 for one not seen in training.
        labels: float32 [n], 0 or 1.
    """

    numeric: npt.NDArray[np.float32]
    categorical: npt.NDArray[np.int64]
    labels: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class Flights:
    """Training and validation rows, and how many values each categorical column has (the unknown one included)."""

    train: Rows
    validation: Rows
    cardinalities: tuple[int, ...]


def load_flights(path: Path) -> Flights:
    """Reads `flights.csv`, or the folder that has it, and splits its rows at random, always alike.

    Raises:
        FlightsError: where it can't be read, lacks columns or has no rows.
    """
    file = path / "flights.csv" if path.is_dir() else path
    try:
        with file.open(newline="") as table:
            rows = [row for row in csv.DictReader(table) if row["arr_delay"] not in ("", "NA")]
        numeric = np.array([_numeric(row) for row in rows], np.float32)
        names = np.array([_categorical(row) for row in rows])
        labels = np.array([float(row["arr_delay"]) > LATE for row in rows], np.float32)
    except (OSError, KeyError, ValueError) as error:
        raise FlightsError(f"{file}: not the table of flights: {error!r}") from None
    if len(rows) < 2:
        raise FlightsError(f"{file}: {len(rows)} rows with an arrival")
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(rows))
    held_out = max(1, round(HELD_OUT * len(rows)))
    validation, train = np.sort(order[:held_out]), np.sort(order[held_out:])
    numbers, cardinalities = _numbered(names, train)
    mean, deviation = numeric[train].mean(axis=0), numeric[train].std(axis=0) + 1e-6
    numeric = (numeric - mean) / deviation
    parts = [Rows(numeric[part], numbers[part], labels[part]) for part in (train, validation)]
    return Flights(parts[0], parts[1], cardinalities)


def _numbered(
    names: npt.NDArray[np.str_], train: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], tuple[int, ...]]:
    """Every column's values numbered from 1 in their order, 0 for those that no training row has."""
    numbers, cardinalities = np.zeros(names.shape, np.int64), []
    for column in range(names.shape[1]):
        known = np.unique(names[train, column])
        places = np.minimum(np.searchsorted(known, names[:, column]), len(known) - 1)
        numbers[:, column] = np.where(known[places] == names[:, column], places + 1, 0)
        cardinalities.append(len(known) + 1)
    return numbers, tuple(cardinalities)


def _numeric(row: Mapping[str, str]) -> Sequence[float]:
    departure, arrival = _minute(row["sched_dep_time"]), _minute(row["sched_arr_time"])
    day = _date(row).timetuple().tm_yday
    return float(row["distance"]), departure, arrival, (arrival - departure) % _MINUTES_A_DAY, day


def _categorical(row: Mapping[str, str]) -> Sequence[str]:
    date = _date(row)
    plain = (row[name] for name in ("carrier", "flight", "tailnum", "origin", "dest", "hour"))
    return *plain, date.isoformat(), str(date.weekday())


def _minute(clock: str) -> int:
    """Minutes since midnight of a time written as 1435 or 5."""
    return 60 * (int(clock) // 100) + int(clock) % 100


def _date(row: Mapping[str, str]) -> datetime.date:
    return datetime.date(int(row["year"]), int(row["month"]), int(row["day"]))
