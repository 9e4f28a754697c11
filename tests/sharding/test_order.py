"""Blocks and names of several ranks in the order of the undivided model."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from ds_shampoo.algorithm.blocks import cut
from ds_shampoo.sharding.model_order import union_over_ranks
from tests.distributed.pool import WorkerPool


def rounds_of_two_stages() -> dict[str, list[str]]:
    """What a rank finds where one stage has blocks of a schedule that the other has none of."""
    of_rank = [{"often": ["first"]}, {"rare": ["head"], "often": ["second", "third"]}][dist.get_rank()]
    mine = {key: [block for name in names for block in whole(name)] for key, names in of_rank.items()}
    return {str(key): [str(block) for block in blocks] for key, blocks in union_over_ranks(mine).items()}


def whole(name: str) -> tuple:
    blocked = cut(name, (4, 4), block_size=4)
    assert blocked is not None
    return blocked.blocks


def test_ranks_may_have_different_rounds(pools: Callable[[int], WorkerPool]) -> None:
    for found in pools(2).run(rounds_of_two_stages):
        assert list(found.items()) == [("often", ["first[0]", "second[0]", "third[0]"]), ("rare", ["head[0]"])]
