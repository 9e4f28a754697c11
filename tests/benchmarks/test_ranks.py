"""The benchmarks that count over ranks: bytes of a step's allocations, and the exchange against its prediction."""

from __future__ import annotations

import argparse

import pytest
import torch

from benchmarks.memory import Memory, peak_of, results_table
from benchmarks.scaling import launch


def test_the_peak_is_what_was_there_at_once() -> None:
    kept = []

    def step() -> None:
        first = torch.empty(1_000_000)
        del first
        kept.append(torch.empty(500_000))
        second = torch.empty(1_500_000)
        del second

    # Allocators round up, by less than a page each.
    assert peak_of(step) == pytest.approx(8_000_000, abs=3 * 4096)


def test_bytes_are_told_per_element_of_an_even_share() -> None:
    memory = Memory(
        2, ranks=2, elements=1000, preconditioned=800, adam=4000, factors=3200, roots=3200, host=0, step=500
    )
    assert memory.per_element("adam") == 8
    assert memory.preconditioner == 16
    assert "target 16: met" in results_table([memory])


@pytest.mark.parametrize("stage", [2, 3])
def test_ranks_send_what_was_predicted(stage: int) -> None:
    # Blocks of 48 do not divide the matrices, so that some lie across the border of two shards.
    args = argparse.Namespace(stage=stage, steps=14, layers=2, d_model=64, block_size=48)
    ranks = launch(2, args)
    assert [rank.exchange_bytes for rank in ranks] == [rank.predicted_bytes for rank in ranks]
    assert max(rank.exchange_bytes for rank in ranks) > 0
    assert sum(rank.owned for rank in ranks) == pytest.approx(1)
