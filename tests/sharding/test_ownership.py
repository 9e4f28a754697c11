"""Ownership: one owner a block, loads as even as the blocks allow, and the same table for everyone."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_shampoo.algorithm.blocks import cut
from ds_shampoo.algorithm.cost import step_flops
from ds_shampoo.sharding.ownership import assign, fingerprint, load_bound

# The matrices of one layer and how many layers; out x in, as torch's Linear keeps them.
MODELS = {
    "gpt2-small": (12, [(2304, 768), (768, 768), (3072, 768), (768, 3072)]),
    "bert-large": (24, [(1024, 1024)] * 4 + [(4096, 1024), (1024, 4096)]),
}


def model_blocks(name: str, block_size: int) -> tuple[list[float], list[int]]:
    """The cost of every block of a model, in order, and where each begins in the flat buffer."""
    layers, shapes = MODELS[name]
    costs, starts, offset = [], [], 0
    for layer, (index, shape) in itertools.product(range(layers), enumerate(shapes)):
        blocked = cut(f"layers.{layer}.{index}", shape, block_size=block_size)
        assert blocked is not None
        for block in blocked.blocks:
            costs.append(step_flops(block, 1, 10, "shampoo"))
            starts.append(offset + block.starts[0] * shape[1] + block.starts[1])
        offset += shape[0] * shape[1]
    return costs, starts


def flat_homes(starts: list[int], world: int, name: str) -> list[int]:
    layers, shapes = MODELS[name]
    total = layers * sum(a * b for a, b in shapes)
    return [start * world // total for start in starts]


@pytest.mark.parametrize("block_size", [128, 256, 1024])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_loads_are_balanced_on_real_shapes(name: str, block_size: int) -> None:
    """At most 1.05 times the mean or the largest block, unless no table at all can do that.

    With few large blocks to a rank the count decides: 288 equal blocks on 256 ranks leave one rank with two. What
    pigeonholes force, `load_bound` computes; everything that leaves room must meet the plain bound.
    """
    costs, starts = model_blocks(name, block_size)
    for world in (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512):
        owners = assign(costs, flat_homes(starts, world, name), [0.0] * world)
        loads = [0.0] * world
        for owner, cost in zip(owners, costs, strict=True):
            loads[owner] += cost
        plain = max(1.05 * sum(costs) / world, max(costs))
        assert max(loads) <= load_bound(costs, [0.0] * world) * (1 + 1e-9), (world, max(loads) / plain)
        if len(costs) >= 40 * world:
            assert max(loads) <= plain * (1 + 1e-9)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_most_blocks_stay_where_they_lie(world: int) -> None:
    costs, starts = model_blocks("bert-large", 256)
    homes = flat_homes(starts, world, "bert-large")
    owners = assign(costs, homes, [0.0] * world)
    assert sum(owner == home for owner, home in zip(owners, homes, strict=True)) >= 0.95 * len(owners)


@given(
    st.lists(st.floats(0.5, 100), min_size=1, max_size=60),
    st.integers(1, 9),
    st.randoms(use_true_random=False),
)
def test_every_rank_makes_the_same_table(costs: list[float], world: int, random_: random.Random) -> None:
    homes = [random_.choice([None, *range(world)]) for _ in costs]
    tables = [assign(list(costs), list(homes), [0.0] * world) for _ in range(2)]
    assert tables[0] == tables[1]
    assert len(tables[0]) == len(costs)
    assert set(tables[0]) <= set(range(world))
    assert fingerprint(tables[0]) == fingerprint(tables[1])


@given(st.lists(st.floats(0.5, 100), min_size=1, max_size=10), st.integers(1, 3))
def test_the_bound_never_asks_for_more_than_a_table_can_give(costs: list[float], world: int) -> None:
    """The pigeonhole bound holds for every table of small instances."""
    best = (
        min(
            max(sum(c for c, o in zip(costs, table, strict=True) if o == rank) for rank in range(world))
            for table in itertools.product(range(world), repeat=min(len(costs), 7))
        )
        if len(costs) <= 7
        else None
    )
    if best is not None:
        assert load_bound(costs, [0.0] * world) <= max(1.05 * sum(costs) / world, best) * (1 + 1e-9)


def test_loads_of_other_groups_count() -> None:
    assert assign([1.0, 1.0], [None, None], [10.0, 0.0]) == [1, 1]


def test_fingerprints_tell_tables_apart() -> None:
    assert fingerprint([0, 1]) != fingerprint([1, 0])
