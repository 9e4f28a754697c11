"""What the benchmarks of scaling and memory count, on cases that can be counted by hand."""

from __future__ import annotations

import torch

from benchmarks.allocations import Allocations, allocations_of, summarize
from benchmarks.memory import RankResult, storage_bytes, worst
from benchmarks.scaling import RankResult as ScalingResult
from benchmarks.scaling import predicted_bytes, scaling
from ds_shampoo.algorithm.blocks import cut
from ds_shampoo.sharding.fragments import Fragment, pieces_of


def test_bytes_of_the_exchange() -> None:
    """An 8 x 4 weight in two blocks, the first 12 elements on rank 0: half of the second block's rows change place."""
    blocked = cut("w", (8, 4), block_size=4)
    assert blocked is not None
    fragments = [Fragment("w", 0, 12, 0, 0, 0), Fragment("w", 12, 20, 1, 0, 0)]
    numbered = list(enumerate(blocked.blocks))
    pieces = [piece for fragment in fragments for piece in pieces_of(fragment, blocked.shape, numbered)]
    # The first block, 16 elements, lies over both ranks; rank 0 owns it: 4 elements twice out of rank 1, once back.
    sent = [predicted_bytes(blocked.blocks, pieces, [0, 1], rank) for rank in range(2)]
    assert sent == [4 * 4, 2 * 4 * 4]


def test_rows_are_of_the_busiest_rank() -> None:
    rows = scaling(
        {
            1: [ScalingResult(40.0, 8.0, 8.0, 0, 0, {"exchange": 1.0})],
            2: [
                ScalingResult(18.0, 3.0, 8.0, 7, 7, {"exchange": 2.0}),
                ScalingResult(22.0, 5.0, 8.0, 3, 3, {"exchange": 3.0}),
            ],
        }
    )
    assert [row.phases["exchange"] for row in rows] == [1.0, 3.0]
    assert [(row.ratio, row.share, row.exchange_bytes) for row in rows] == [(1.0, 1.0, 0), (0.55, 0.625, 7)]


def test_bytes_per_parameter_and_rank() -> None:
    row = worst(2, [RankResult(400, 640, 0, 80, 8), RankResult(400, 960, 0, 40, 16)], numel=100, inside=80)
    assert (row.moments, row.preconditioner, row.host, row.step_peak) == (8.0, 24.0, 1.6, 0.32)


def test_shared_storages_count_once() -> None:
    whole = torch.zeros(10)
    assert storage_bytes([whole, whole[:3], torch.zeros(2)]) == 48


def test_allocations_are_seen() -> None:
    assert summarize([100, 50, -100, 20]) == Allocations(100, 150, 70)
    assert summarize([-8]) == Allocations(0, 0, -8)
    kept: list[torch.Tensor] = []
    found = allocations_of(lambda: kept.append(torch.zeros(1000).add(1)))
    assert (found.largest, found.kept) == (4000, 4000)
    assert 8000 <= found.peak < 8100
