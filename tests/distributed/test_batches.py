"""Experts that are stacked in one parameter follow the trajectory of separate ones, at every stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed import batch_jobs
from tests.distributed.jobs import SHAMPOO, engine_config
from tests.distributed.pool import WorkerPool
from tests.distributed.test_parity import FP32

Pools = Callable[[int], WorkerPool]
STEPS = 16
PATTERN = {"batch_dims": {"mixture.*_proj": 1}}


def check(pools: Pools, ranks: int, stage: int, changed: dict[str, Any], told: bool = True) -> None:
    settings = {**SHAMPOO, "block_size": 8, **changed}
    config = engine_config(settings, stage, ranks, size=batch_jobs.BATCH)
    expected, counted = batch_jobs.alone({k: v for k, v in settings.items() if k not in PATTERN}, STEPS)
    start, _ = batch_jobs.alone(settings if told else {**settings, "batch_dims": None}, 0)
    found = pools(ranks).run(batch_jobs.job, config, STEPS, told)
    for end, _ in found:
        assert np.linalg.norm(end - expected) <= FP32 * np.linalg.norm(expected - start)
    for key in ("preconditioned_blocks", "root_updates"):
        assert sum(metrics[key] for _, metrics in found) == counted[key] > 0
    if ranks > 1:  # owners share them out
        assert all(metrics["owned_blocks"] > 0 for _, metrics in found)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_at_every_stage(pools: Pools, stage: int) -> None:
    check(pools, 2, stage, {})


@pytest.mark.parametrize(("ranks", "stage"), [(4, 2), (2, 3)])
def test_told_by_the_json(pools: Pools, ranks: int, stage: int) -> None:
    check(pools, ranks, stage, {**PATTERN, "preconditioner": "spectral"}, told=False)


@pytest.mark.parametrize("stage", [1, 3])
def test_their_own_norms_where_they_have_no_blocks(pools: Pools, stage: int) -> None:
    """Ranks' borders run through experts, whose gradients are normalised one by one."""
    check(pools, 2, stage, {"grafting": "adam_normalized", "max_preconditioner_dim": 14})


@pytest.mark.parametrize("stage", [0, 2])
def test_they_resume_bit_for_bit(pools: Pools, tmp_path: Path, stage: int) -> None:
    config = engine_config({**SHAMPOO, "block_size": 8}, stage, 2, size=batch_jobs.BATCH)
    saved = {"folder": str(tmp_path), "save_at": 7}
    straight = pools(2).run(batch_jobs.job, config, STEPS, **saved)
    resumed = pools(2).run(batch_jobs.job, config, STEPS, **saved, resume=True)
    assert all(np.array_equal(before, after) for (before, _), (after, _) in zip(straight, resumed, strict=True))


@pytest.mark.parametrize("key", ["batch_dims", "roles"])
def test_patterns_that_match_nothing_are_refused(pools: Pools, key: str) -> None:
    settings = {**SHAMPOO, key: {"mixture.*_prod": {"batch_dims": 1, "roles": "none"}[key]}}
    for message in pools(2).run(batch_jobs.refusal, engine_config(settings, 2, 2, size=batch_jobs.BATCH)):
        assert f"'{key}' has the pattern 'mixture.*_prod', which matches no parameter; their names are first" in message
