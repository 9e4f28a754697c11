"""Saving between micro-batches is refused, and only there, whoever sets the boundary of a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import checkpoint_jobs
from tests.distributed.jobs import SHAMPOO, engine_config
from tests.distributed.pool import WorkerPool

Pools = Callable[[int], WorkerPool]

OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}}
BF16_OPTIMIZER = {"data_types": {"grad_accum_dtype": "fp32"}}


@pytest.mark.parametrize(
    ("stage", "precision", "direct", "other"),
    [
        (0, "fp32", False, {}),
        (0, "bf16", False, {}),
        (1, "fp32", False, {}),
        (1, "bf16", False, BF16_OPTIMIZER),
        (1, "fp16", False, {}),
        (2, "fp32", False, {}),
        (2, "fp32", True, {}),
        (2, "bf16", False, OFFLOAD),
        (3, "fp32", False, {}),
        (3, "bf16", True, {}),
        (3, "bf16", False, OFFLOAD),
    ],
)
def test_what_was_accumulated_decides(
    pools: Pools, tmp_path: Path, stage: int, precision: str, direct: bool, other: dict[str, Any]
) -> None:
    config = engine_config(SHAMPOO, stage, 1, 4, precision=precision, **other)
    (found,) = pools(1).run(checkpoint_jobs.accumulating, config, str(tmp_path), direct)
    assert found == {
        "new": [True],
        "engine": [False] * 7 + [True],
        "loaded between": [False],
        "loaded": [True],
        "by hand": [False, False, True, False, False, True, False],
        "other size": [False, False, False, True, False, False, True, False, True],
    }


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_step_that_overflowed_is_a_step(pools: Pools, tmp_path: Path, stage: int) -> None:
    config = engine_config(SHAMPOO, stage, 1, precision="fp16")
    config["fp16"]["initial_scale_power"] = 40
    (found,) = pools(1).run(checkpoint_jobs.overflow_then_save, config, str(tmp_path))
    assert found[0] > 0
    assert found[1]


def test_what_was_frozen_at_the_start_counts(pools: Pools, tmp_path: Path) -> None:
    assert pools(1).run(checkpoint_jobs.unfrozen_later, engine_config(SHAMPOO, 0, 1, 2), str(tmp_path)) == [[False]]
