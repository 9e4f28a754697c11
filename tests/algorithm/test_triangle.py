"""Packed lower triangles: where their elements lie, and that nothing above the diagonal counts."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ds_shampoo.algorithm.triangle import packed_numel, panels, unpack, views


@hypothesis_settings(deadline=None, max_examples=30)
@given(st.integers(1, 700), st.integers(0, 2))
def test_a_matrix_goes_round(order: int, stacked: int) -> None:
    shape = (3,) * stacked
    lower = torch.randn(*shape, order, order).tril()
    full = lower + lower.tril(-1).mT
    packed = torch.full((*shape, packed_numel(order)), torch.nan)
    for panel, part in views(packed, order):
        part.copy_(full[..., panel.start :, panel.start : panel.start + panel.width])
    assert not packed.isnan().any()  # the panels are all of it
    assert torch.equal(unpack(packed, order), full)


def test_what_a_panel_has_above_the_diagonal_does_not_count() -> None:
    order = 300
    packed = torch.randn(packed_numel(order))
    full = unpack(packed, order)
    for panel, part in views(packed, order):
        part[: panel.width].masked_fill_(torch.ones(panel.width, panel.width).triu(1).bool(), torch.nan)
    assert torch.equal(unpack(packed, order), full)


def test_what_is_kept_comes_close_to_half() -> None:
    assert [packed_numel(order) / order**2 for order in (128, 256, 512, 1024, 8192)] == [1, 0.75, 0.625, 0.5625, 0.5625]
    assert len(panels(8192)) == 8
