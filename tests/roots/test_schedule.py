"""The schedule: statistics and roots fall due when the specification says."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_shampoo.algorithm.blocks import Block, cut
from ds_shampoo.roots.schedule import FIRST_WITHIN, RootSchedule, turns_of

counts = st.integers(1, 20)


@given(counts, counts, counts)
def test_intervals_and_start(start: int, statistics: int, roots: int) -> None:
    schedule = RootSchedule(start, statistics, roots)
    steps = range(1, 100)
    assert [t for t in steps if schedule.statistics_due(t)] == list(range(1, 100, statistics))
    assert [t for t in steps if schedule.is_boundary(t, 0)] == list(range(start, 100, roots))
    assert [t for t in steps if schedule.preconditions(t)] == list(range(start, 100))


@given(counts, counts, counts)
def test_a_parameter_without_gradient_is_never_due(start: int, statistics: int, roots: int) -> None:
    schedule = RootSchedule(start, statistics, roots)
    assert not schedule.statistics_due(0)
    assert not schedule.is_boundary(0, 0)


@given(counts, st.integers(1, 60), st.integers(0, 80), st.data())
def test_every_place_has_one_boundary_in_every_interval_after_an_early_one(
    start: int, roots: int, turn: int, data: st.DataObject
) -> None:
    schedule, delay = RootSchedule(start, 1, roots), data.draw(st.integers(0, roots))
    boundaries = [t for t in range(1, 300) if schedule.is_boundary(t, turn)]
    gaps = [b - a for a, b in itertools.pairwise(boundaries)]
    assert set(gaps[1:]) <= {roots}
    assert gaps[0] <= roots
    assert start + turn % roots in boundaries
    assert boundaries[0] < start + FIRST_WITHIN
    delays = [schedule.delay(t, turn, delay) for t in boundaries]
    assert all(own <= gap for own, gap in zip(delays, gaps, strict=False)), "in force before the next are begun"
    assert set(delays[1:]) <= {delay}
    assert delays[0] == min(delay, gaps[0])


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
def test_every_step_carries_an_equal_share_on_every_rank(layers: int, width: int, block_size: int, ranks: int) -> None:
    """Within two blocks of the largest kind, for a rank that owns a consecutive part of the model."""
    interval, blocks = 10, gpt(layers, width, block_size)
    turns = turns_of(blocks, first=3)
    assert sorted(turns) == list(range(3, 3 + len(blocks)))
    work = [sum(dim**3 for dim in block.factor_dims) for block in blocks]
    for rank in range(ranks):
        mine = range(len(blocks) * rank // ranks, len(blocks) * (rank + 1) // ranks)
        loads = Counter(dict.fromkeys(range(interval), 0))
        for i in mine:
            loads[turns[i] % interval] += work[i]
        assert max(loads.values()) - min(loads.values()) <= 2 * max(work)


def test_larger_blocks_have_the_first_places() -> None:
    blocks = [*gpt(1, 32, 16), *gpt(1, 64, 32)]
    turns = turns_of(blocks)
    assert max(p for p, b in zip(turns, blocks, strict=True) if b.shape == (32, 32)) < min(
        p for p, b in zip(turns, blocks, strict=True) if b.shape == (16, 16)
    )
