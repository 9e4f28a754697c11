"""Blocks tile a parameter exactly once, under identities that no sharding changes."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_shampoo.algorithm.blocks import cut, merge_small_dims

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@settings(deadline=None)
@given(shapes, st.integers(1, 12), st.booleans(), st.sampled_from([None, 0, -1]), st.none() | st.integers(1, 9))
def test_blocks_tile_the_parameter(
    shape: tuple[int, ...], block_size: int, merge: bool, skip: int | None, limit: int | None
) -> None:
    blocked = cut("w", shape, block_size=block_size, merge=merge, skip_dim=skip, max_preconditioner_dim=limit)
    if blocked is None:
        return
    assert math.prod(blocked.shape) == math.prod(shape)
    hits = torch.zeros(blocked.shape, dtype=torch.long)
    for number, block in enumerate(blocked.blocks):
        assert block.index == number
        hits[tuple(slice(a, a + n) for a, n in zip(block.starts, block.shape, strict=True))] += 1
        assert block.preconditioned
        for dim, extent in enumerate(block.shape):
            if dim in block.preconditioned:
                assert extent <= block_size
                assert limit is None or blocked.shape[dim] <= limit
            else:
                assert extent == blocked.shape[dim]
    assert bool((hits == 1).all())


@settings(deadline=None)
@given(shapes, st.integers(1, 100))
def test_merging_keeps_the_size_and_two_dims(shape: tuple[int, ...], limit: int) -> None:
    dims = tuple(dim for dim in shape if dim != 1)
    merged = merge_small_dims(dims, limit)
    assert math.prod(merged) == math.prod(dims)
    assert len(merged) >= min(2, len(dims))
    if len(dims) <= 2:
        assert merged == dims
    if len(merged) > 2:
        assert all(a * b > limit for a, b in itertools.pairwise(merged))


@pytest.mark.parametrize(
    ("shape", "size", "expected"),
    [
        ((64, 64, 3, 3), 1024, (64, 576)),
        ((8, 8, 3, 3), 1024, (8, 72)),
        ((4, 256, 256), 256, (4, 256, 256)),
        ((1, 32, 1, 16), 64, (32, 16)),
    ],
)
def test_known_merges(shape: tuple[int, ...], size: int, expected: tuple[int, ...]) -> None:
    blocked = cut("w", shape, block_size=size)
    assert blocked is not None
    assert blocked.shape == expected


@pytest.mark.parametrize("shape", [(), (5,), (1, 7), (0, 4), (3, 0, 2)])
def test_what_has_no_blocks(shape: tuple[int, ...]) -> None:
    assert cut("w", shape, block_size=4) is None


def test_a_large_dim_is_left_whole_and_unpreconditioned() -> None:
    blocked = cut("w", (100, 6), block_size=4, max_preconditioner_dim=50)
    assert blocked is not None
    assert [block.shape for block in blocked.blocks] == [(100, 4), (100, 2)]
    assert {block.preconditioned for block in blocked.blocks} == {(1,)}
    assert cut("w", (100, 60), block_size=4, max_preconditioner_dim=50) is None


@settings(deadline=None)
@given(shapes, st.integers(1, 12), st.floats(1, 4), st.sampled_from([None, 0, -1]))
def test_no_factor_outweighs_its_block_by_more_than_the_ratio(
    shape: tuple[int, ...], block_size: int, ratio: float, skip: int | None
) -> None:
    usual = cut("w", shape, block_size=block_size, skip_dim=skip)
    limited = cut("w", shape, block_size=block_size, skip_dim=skip, max_factor_ratio=ratio)
    assert (usual is None) == (limited is None)
    if usual is None or limited is None:
        return
    assert limited.shape == usual.shape
    assert {block.preconditioned for block in limited.blocks} == {block.preconditioned for block in usual.blocks}
    first = limited.blocks[0]  # a whole one
    assert max(first.factor_dims) ** 2 <= ratio * first.numel
    within = max(usual.blocks[0].factor_dims) ** 2 <= ratio * usual.blocks[0].numel
    assert not within or limited == usual


def test_a_skinny_matrix_is_cut_to_its_measure() -> None:
    blocked = cut("w", (50_000, 8), block_size=1024, max_factor_ratio=16)
    assert blocked is not None
    assert {block.shape for block in blocked.blocks} == {(128, 8), (80, 8)}
    wide = cut("w", (16, 4096), block_size=1024, max_factor_ratio=16)
    assert wide is not None
    assert {block.shape for block in wide.blocks} == {(16, 256)}
    square = cut("w", (4096, 1024), block_size=1024, max_factor_ratio=1)
    assert square is not None
    assert len(square.blocks) == 4
