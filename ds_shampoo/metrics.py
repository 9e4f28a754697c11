"""`Shampoo.metrics()`: what the param groups, the root threads and the stopwatch count, as one flat dict."""

from __future__ import annotations

from collections.abc import Collection

from ds_shampoo.group import ShardedGroup
from ds_shampoo.host.service import RootService
from ds_shampoo.stopwatch import Stopwatch


def collect(
    groups: Collection[ShardedGroup], service: RootService, stopwatch: Stopwatch, sync: bool
) -> dict[str, float]:
    """Adds the groups' counts up; see `Shampoo.metrics` for the keys."""
    slots = [(group, entry) for group in groups for entry in group.slots()]
    ages = [age for group, (_, _, keeper, slot) in slots if (age := keeper.age(slot, group.last_step)) is not None]
    return {
        "owned_blocks": len(slots),
        "preconditioned_blocks": len(ages),
        "root_updates": sum(group.counts.updates for group in groups),
        "root_fallbacks": sum(group.counts.fallbacks for group in groups),
        "roots_skipped": sum(group.counts.skipped for group in groups),
        "roots_rejected": sum(group.counts.rejected for group in groups),
        "root_age_mean": sum(ages) / len(ages) if ages else 0.0,
        "root_age_max": max(ages, default=0),
        "exchange_bytes": sum(group.exchange_bytes for group in groups),
        **service.metrics(),
        **{f"{phase}_ms": ms for phase, ms in stopwatch.read(sync).items()},
    }
