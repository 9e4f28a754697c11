"""`Shampoo.metrics()`: what the param groups, the root threads and the stopwatch count, as one flat dict."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from ds_shampoo.step.sharded_group import ShardedGroup
from ds_shampoo.step.subgroups import Workplace


def collect(groups: Collection[ShardedGroup], workplaces: Sequence[Workplace], sync: bool) -> dict[str, float]:
    """Adds the groups' counts up; see `Shampoo.metrics` for the keys."""
    blocks = [(group, owned) for group in groups for owned in group.owned_blocks]
    ages = [age for group, owned in blocks if (age := owned.root_age(group.last_step)) is not None]
    return {
        "owned_blocks": len(blocks),
        "preconditioned_blocks": len(ages),
        "root_updates": sum(group.counts.updates for group in groups),
        "root_fallbacks": sum(group.counts.fallbacks for group in groups),
        "roots_skipped": sum(group.counts.skipped for group in groups),
        "roots_rejected": sum(group.counts.rejected for group in groups),
        "statistics_restarted": sum(group.counts.restarted for group in groups),
        "root_age_mean": sum(ages) / len(ages) if ages else 0.0,
        "root_age_max": max(ages, default=0),
        "exchange_bytes": sum(group.exchange_bytes for group in groups),
        **_sums([workplace.service.metrics() for workplace in workplaces]),
        **_sums([{f"{p}_ms": ms for p, ms in w.stopwatch.read(sync).items()} for w in workplaces]),
    }


def _sums(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """What several devices say, added up; one as it is."""
    return {key: sum(each[key] for each in found) for key in (found[0] if found else ())}
