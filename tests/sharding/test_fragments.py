"""Fragments: any contiguous run of any tensor splits into boxes that meet each block exactly once."""

import itertools
import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_shampoo.algorithm.blocks import cut
from ds_shampoo.sharding.fragments import Fragment, pieces_of, split_run

shapes = st.lists(st.integers(1, 7), min_size=1, max_size=4).map(tuple)


@given(shapes, st.data())
def test_boxes_cover_the_run_once(shape: tuple[int, ...], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    hits = torch.zeros(shape, dtype=torch.long)
    boxes = list(split_run(shape, start, stop))
    for box in boxes:
        hits[tuple(slice(a, a + n) for a, n in zip(box.starts, box.sizes, strict=True))] += 1
    expected = torch.zeros(numel, dtype=torch.long)
    expected[start:stop] = 1
    assert torch.equal(hits.view(-1), expected)
    assert len(boxes) <= 2 * len(shape) - 1


@given(st.tuples(st.integers(2, 12), st.integers(2, 12)), st.integers(1, 6), st.data())
def test_pieces_find_each_element_of_each_block(shape: tuple[int, int], size: int, data: st.DataObject) -> None:
    """Cuts the parameter among ranks at random places and puts every block together again from the pieces."""
    blocked = cut("w", shape, block_size=size, merge=False)
    assert blocked is not None
    numel = math.prod(shape)
    cuts = sorted(data.draw(st.lists(st.integers(0, numel), max_size=4)))
    bounds = list(itertools.pairwise([0, *cuts, numel]))
    parameter = torch.arange(numel)
    shift = 3  # where the parameter begins in each rank's buffer
    buffers = {rank: torch.cat([torch.full((shift,), -1), parameter[a:b]]) for rank, (a, b) in enumerate(bounds)}
    numbered = list(enumerate(blocked.blocks))
    found = [torch.full(block.shape, -1) for block in blocked.blocks]
    for rank, (a, b) in enumerate(bounds):
        for piece in pieces_of(Fragment("w", a, b - a, rank, 0, shift), blocked.shape, numbered):
            view = buffers[rank].as_strided(piece.box.sizes, piece.strides, piece.offset)
            place = tuple(slice(s, s + n) for s, n in zip(piece.box.starts, piece.box.sizes, strict=True))
            assert bool((found[piece.block][place] == -1).all())
            found[piece.block][place] = view
    whole = parameter.view(blocked.shape)
    for block, values in zip(blocked.blocks, found, strict=True):
        place = tuple(slice(s, s + n) for s, n in zip(block.starts, block.shape, strict=True))
        assert torch.equal(values, whole[place])
