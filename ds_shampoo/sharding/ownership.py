"""Ownership: which rank keeps which block, balanced on cost, preferring the rank that already holds it."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence

# How much more than the mean a rank may carry so that blocks can stay where they lie.
_IMBALANCE = 1.05


def assign(costs: Sequence[float], homes: Sequence[int | None], loads: Sequence[float]) -> list[int]:
    """Gives every block one owner. Pure and deterministic: every rank computes the same table.

    Blocks go in descending cost to the rank that holds most of them while its load stays within the bound,
    else to the least loaded rank. Should that end above the bound, the plain longest-processing-time table is
    taken where it is better.

    Args:
        costs: one per block, in flops per step.
        homes: the rank that holds most of each block; None where every rank holds all of it.
        loads: what each rank carries already, from other groups.
    """
    order = sorted(range(len(costs)), key=lambda block: (-costs[block], block))
    bound = load_bound(costs, loads)
    local, local_load = _greedy(order, costs, loads, homes=homes, bound=bound)
    if local_load <= bound:
        return local
    balanced, balanced_load = _greedy(order, costs, loads, homes=homes, bound=0.0)
    return balanced if balanced_load < local_load else local


def load_bound(costs: Sequence[float], loads: Sequence[float]) -> float:
    """The largest load that `assign` accepts for the sake of locality.

    It is 1.05 times the mean, but no table at all can stay below the largest block, nor (pigeonholes) below the
    k + 1 smallest of the k * N + 1 largest blocks on N ranks.
    """
    world = len(loads)
    descending = sorted(costs, reverse=True)
    mean = (sum(costs) + sum(loads)) / world
    crowded = (
        sum(descending[k * world - k : k * world + 1]) for k in range(1, (len(costs) - 1) // world + 1) if len(costs)
    )
    return max(_IMBALANCE * mean, max(descending, default=0.0), max(crowded, default=0.0))


def fingerprint(table: Sequence[object]) -> int:
    """A hash of a table that agrees across processes and machines, as a number of 62 bits."""
    digest = hashlib.sha256(repr(list(table)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def _greedy(
    order: Sequence[int],
    costs: Sequence[float],
    loads: Sequence[float],
    *,
    homes: Sequence[int | None],
    bound: float,
) -> tuple[list[int], float]:
    carried = list(loads)
    heap = [(load, rank) for rank, load in enumerate(carried)]
    heapq.heapify(heap)
    owners = [0] * len(costs)
    for block in order:
        rank = homes[block]
        if rank is None or carried[rank] + costs[block] > bound:
            while heap[0][0] != carried[heap[0][1]]:  # an entry that a later placement has made stale
                heapq.heappop(heap)
            rank = heap[0][1]
        carried[rank] += costs[block]
        heapq.heappush(heap, (carried[rank], rank))
        owners[block] = rank
    return owners, max(carried)
