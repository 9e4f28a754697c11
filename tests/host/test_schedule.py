"""The schedule: statistics and roots fall due when the specification says."""

from hypothesis import given
from hypothesis import strategies as st

from ds_shampoo.host.schedule import RootSchedule

counts = st.integers(1, 20)


@given(counts, counts, counts)
def test_intervals_and_start(start: int, statistics: int, roots: int) -> None:
    schedule = RootSchedule(start, statistics, roots)
    steps = range(1, 100)
    assert [t for t in steps if schedule.statistics_due(t)] == list(range(1, 100, statistics))
    assert [t for t in steps if schedule.is_boundary(t)] == list(range(start, 100, roots))
    assert [t for t in steps if schedule.preconditions(t)] == list(range(start, 100))


@given(counts, counts, counts)
def test_a_parameter_without_gradient_is_never_due(start: int, statistics: int, roots: int) -> None:
    schedule = RootSchedule(start, statistics, roots)
    assert not schedule.statistics_due(0)
    assert not schedule.is_boundary(0)
