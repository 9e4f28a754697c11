"""The schedule: statistics and roots fall due when the specification says."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_shampoo.algorithm.blocks import Block, cut
from ds_shampoo.roots.schedule import RootSchedule, turns_of

counts = st.integers(1, 20)


@given(counts, counts, counts)
def test_intervals_and_start(start: int, statistics: int, roots: int) -> None:
    schedule = RootSchedule(start, statistics, roots)
    steps = range(1, 100)
    assert [t for t in steps if schedule.statistics_due(t)] == list(range(1, 100, statistics))
    assert [t for t in steps if schedule.preconditions(t)] == list(range(start, 100))
    assert not any(schedule.is_boundary(t, turn) for t in range(1, start) for turn in range(roots))
    assert all(schedule.is_boundary(start, turn) for turn in range(roots))


def boundaries(schedule: RootSchedule, turn: int, last: int) -> list[int]:
    return [t for t in range(1, last) if schedule.is_boundary(t, turn)]


def test_the_first_rounds() -> None:
    """Those of the block that is the first in each; one in the middle comes half a round later."""
    assert boundaries(RootSchedule(1, 1, 50), 0, 250) == [1, 2, 3, 5, 8, 12, 18, 27, 41, 62, 93, 140, 190, 240]
    assert boundaries(RootSchedule(4, 1, 10), 0, 60) == [4, 5, 6, 8, 11, 15, 21, 30, 40, 50]
    half = next(turn for turn in range(50) if turn * 31 % 50 == 25)
    assert boundaries(RootSchedule(1, 1, 50), half, 120) == [1, 2, 4, 6, 10, 15, 22, 34, 51, 77, 116]
    assert boundaries(RootSchedule(3, 1, 1), 5, 9) == [3, 4, 5, 6, 7, 8]


@given(counts, counts, counts)
def test_a_parameter_without_gradient_is_never_due(start: int, statistics: int, roots: int) -> None:
    schedule = RootSchedule(start, statistics, roots)
    assert not schedule.statistics_due(0)
    assert not schedule.is_boundary(0, 0)


@given(counts, st.integers(1, 60), st.integers(0, 80), st.data())
def test_boundaries_come_at_growing_distances_and_roots_before_the_next(
    start: int, roots: int, turn: int, data: st.DataObject
) -> None:
    schedule, usual = RootSchedule(start, 1, roots), data.draw(st.integers(0, roots))
    found = boundaries(schedule, turn, 400)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert found[0] == start
    assert gaps == sorted(gaps)
    assert all(gap <= max(1, roots) for gap in gaps)
    assert gaps[-1] == roots
    # About half of the step count, and a round's rounding.
    assert all(gap >= min(roots, (t - start + 1) / 3 - 1) for t, gap in zip(found, gaps, strict=False))
    assert all(gap <= (t - start + 1) / 2 + 2 for t, gap in zip(found, gaps, strict=False))
    delays = [schedule.delay(t, usual) for t in found]
    assert all(own <= gap for own, gap in zip(delays, gaps, strict=False)), "in force before the next are begun"
    assert all(own <= max(1, (t - start + 1) / 4) for t, own in zip(found, delays, strict=True))
    assert delays == sorted(delays)
    assert delays[-1] == usual


def gpt(layers: int, width: int, block_size: int) -> list[Block]:
    shapes = [
        ("qkv", (3 * width, width)),
        ("out", (width, width)),
        ("up", (4 * width, width)),
        ("down", (width, 4 * width)),
    ]
    cuts = [cut(f"{i}.{name}", shape, block_size=block_size) for i in range(layers) for name, shape in shapes]
    return [block for blocked in cuts if blocked is not None for block in blocked.blocks]


@pytest.mark.parametrize(("layers", "width", "block_size"), [(4, 256, 256), (12, 768, 1024), (24, 1024, 512)])
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("interval", [10, 50])
def test_every_step_carries_an_equal_share_on_every_rank(
    layers: int, width: int, block_size: int, ranks: int, interval: int
) -> None:
    """Within two blocks of the largest kind, for a rank that owns a consecutive part of the model.

    Early rounds divide the places of an interval, not always evenly: no step has more of them than that makes.
    """
    blocks, schedule = gpt(layers, width, block_size), RootSchedule(1, 1, interval)
    turns = turns_of(blocks, first=3)
    assert sorted(turns) == list(range(3, 3 + len(blocks)))
    work = [sum(dim**3 for dim in block.factor_dims) for block in blocks]
    rounds = [t for t in range(1, 6 * interval) if schedule.is_boundary(t, 0)]
    for rank in range(ranks):
        mine = range(len(blocks) * rank // ranks, len(blocks) * (rank + 1) // ranks)
        for begin, end in itertools.pairwise(rounds):
            loads = [sum(work[i] for i in mine if schedule.is_boundary(t, turns[i])) for t in range(begin, end)]
            assert sum(loads) == sum(work[i] for i in mine)
            most = math.ceil(interval / len(loads)) / interval * sum(loads)
            assert max(loads) <= most + 2 * max(work)
            if end - begin == interval:
                assert max(loads) - min(loads) <= 2 * max(work)


def test_larger_blocks_have_the_first_places() -> None:
    blocks = [*gpt(1, 32, 16), *gpt(1, 64, 32)]
    turns = turns_of(blocks)
    assert max(p for p, b in zip(turns, blocks, strict=True) if b.shape == (32, 32)) < min(
        p for p, b in zip(turns, blocks, strict=True) if b.shape == (16, 16)
    )
