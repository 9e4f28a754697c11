"""A Megatron GPT through DeepSpeed's pipeline engine: one trajectory at any number of stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.jobs import engine_config
from tests.distributed.pool import WorkerPool
from tests.distributed.test_parity import FP32

pytest.importorskip("megatron.core")
from tests.megatron_models import pipeline_jobs
from tests.megatron_models.jobs import SETTINGS, Run
from tests.megatron_models.pipeline_jobs import MICRO_BATCHES

Pools = Callable[[int], WorkerPool]
STEPS = 20
CLIP = 0.5  # below every norm of these gradients

# Biases of keys have no gradient but rounding, which Adam would blow up to whole steps.
EPS = {"eps": 1e-6}
_references: dict[str, Run] = {}


def config_of(ranks: int, stage: int, precision: str = "fp32", **settings: Any) -> dict[str, Any]:
    """For this many data-parallel ranks."""
    config = engine_config({**SETTINGS, **EPS, **settings}, stage, ranks, MICRO_BATCHES, precision=precision)
    return {**config, "gradient_clipping": CLIP}


def reference(pools: Pools, **shape: Any) -> Run:
    key = str(shape)
    if key not in _references:
        config = {**engine_config({**SETTINGS, **EPS}, 0, 1), "gradient_clipping": CLIP}
        (_references[key],) = pools(1).run(pipeline_jobs.undivided, config, STEPS, **shape)
    return _references[key]


def check(runs: list[Run], expected: Run) -> None:
    """The whole model's losses, its whole weights to rounding, equal copies, and all its blocks."""
    assert {name for r in runs for name in r.end} == set(expected.end)
    for found in runs:
        assert found.losses == pytest.approx(expected.losses, rel=FP32)
        for name, value in found.end.items():
            twins = [r.end[name] for r in runs if r.tensor_rank == found.tensor_rank and name in r.end]
            assert all(np.array_equal(value, twin) for twin in twins), name
            if value.shape == expected.end[name].shape:
                assert np.abs(value - expected.end[name]).max() <= 1e-5, name
    assert {name for r in runs for name in r.preconditioned} == set(expected.preconditioned) != set()
    assert sum(r.metrics["root_updates"] for r in runs) > 0


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize(
    ("ranks", "tensor_parallel", "stage", "how"),
    [
        (2, 1, 0, {}),
        (4, 1, 0, {}),
        (4, 1, 1, {}),
        (4, 2, 0, {}),
        (4, 2, 1, {"sequence_parallel": True}),
    ],
    ids=["pp", "pp-dp-0", "pp-dp-1", "tp-pp", "tp-pp-sequence"],
)
def test_one_trajectory(
    pools: Pools, ranks: int, tensor_parallel: int, stage: int, how: dict[str, Any], tied: bool
) -> None:
    config = config_of(ranks // tensor_parallel // 2, stage)
    runs = pools(ranks).run(pipeline_jobs.pipeline, config, STEPS, tensor_parallel, tied=tied, **how)
    check(runs, reference(pools, tied=tied))
