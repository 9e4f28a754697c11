"""Samples and validation batches are the same for any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest

from sampling import Draw, dealt, draw


def drawn(**changes: int) -> Draw:
    position = {"seed": 1, "step": 7, "part": 0, "parts": 4, "samples": 3} | changes
    return draw(10_000, **position)


def test_samples_depend_on_seed_and_position_only() -> None:
    assert drawn().keys == drawn().keys
    assert np.array_equal(drawn().places, drawn().places)
    for change in ({"seed": 2}, {"step": 8}, {"part": 1}):
        assert not np.array_equal(drawn().places, drawn(**change).places)
        assert not set(drawn().keys) & set(drawn(**change).keys)


def test_a_step_s_samples_are_the_same_for_any_number_of_parts() -> None:
    whole = drawn(parts=1, samples=12)
    parts = [drawn(part=part) for part in range(4)]
    assert np.array_equal(whole.places, np.concatenate([part.places for part in parts]))
    assert whole.keys == [key for part in parts for key in part.keys]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 12])
def test_every_world_size_validates_on_the_same_batches(world_size: int) -> None:
    shares = [list(dealt(11, rank, world_size)) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1, "ranks with fewer batches would leave collectives alone"
    assert sorted(number for share in shares for number, counts in share if counts) == list(range(11))
