"""A Shampoo object and one out of a callable become an engine's optimizer as the config's does, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed import binding_jobs, parallel_jobs
from tests.distributed.binding_jobs import Outcome
from tests.distributed.jobs import SHAMPOO, an_empty_group_first, decay_groups, engine_config
from tests.distributed.pool import WorkerPool
from tests.distributed.test_parity import BY_ROLE

Pools = Callable[[int], WorkerPool]
STEPS = 8
LAYOUTS = ["ReplicatedLayout", "FlatLayout", "FlatLayout", "SubGroupLayout"]


def same(found: Outcome, expected: Outcome) -> None:
    for field in dataclasses.fields(Outcome):
        assert np.array_equal(getattr(found, field.name), getattr(expected, field.name)), field.name


def check(pools: Pools, ways: list[str], config: dict[str, Any], stage: int, **how: Any) -> None:
    for expected, *others in pools(2).run(binding_jobs.by_ways, ways, config, STEPS, **how):
        assert expected.layout == LAYOUTS[stage]
        assert expected.attached
        for other in others:
            same(other, expected)


@pytest.mark.parametrize(
    ("stage", "precision", "accumulation"),
    [(0, "fp32", 1), (0, "bf16", 2), (1, "fp32", 1), (1, "bf16", 2), (2, "fp16", 1), (3, "fp32", 2), (3, "bf16", 1)],
)
def test_one_trajectory(pools: Pools, stage: int, precision: str, accumulation: int) -> None:
    config = engine_config(SHAMPOO, stage, 2, accumulation, precision, gradient_clipping=1.0)
    check(pools, ["config", "object", "callable", "partial", "pairs"], config, stage)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")])
def test_groups_and_a_scheduler(pools: Pools, stage: int, precision: str) -> None:
    config = engine_config(SHAMPOO, stage, 2, precision=precision)
    check(pools, ["config", "object"], config, stage, groups=decay_groups, scheduled=True)
    check(pools, ["config", "object"], config, stage, groups=an_empty_group_first)


@pytest.mark.parametrize("stage", [1, 3])
def test_settings_by_role(pools: Pools, stage: int) -> None:
    """As JSON has them, with lists for pairs."""
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in BY_ROLE.items()}
    config = engine_config({**SHAMPOO, **settings}, stage, 2)
    check(pools, ["config", "object", "callable"], config, stage, groups=decay_groups, scheduled=True)


@pytest.mark.parametrize("ours", [False, True], ids=["deepspeed.initialize", "ds_shampoo.initialize"])
@pytest.mark.parametrize("stage", [2, 3])
def test_offload(pools: Pools, stage: int, ours: bool) -> None:
    config = engine_config(SHAMPOO, stage, 2, precision="bf16", zero={"offload_optimizer": {"device": "cpu"}})
    check(pools, ["config", "object", "callable"], config, stage, ours=ours)


def test_parameters_that_zero_has_partitioned_already(pools: Pools) -> None:
    config = engine_config(SHAMPOO, 3, 2, precision="bf16", zero={"sub_group_size": 5000})
    check(pools, ["config", "object", "callable"], config, 3, zero_init=True)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_it_resumes(pools: Pools, tmp_path: Path, stage: int) -> None:
    config = engine_config(SHAMPOO, stage, 2, precision="bf16" if stage else "fp32")
    ways = ["object", "config"]
    for expected, *others in pools(2).run(binding_jobs.resumed_by, ways, config, str(tmp_path), 6, 12):
        for other in others:
            same(other, expected)


@pytest.mark.parametrize("stage", [0, 1])
def test_pipelines(pools: Pools, stage: int) -> None:
    config = engine_config(SHAMPOO, stage, 1, parallel_jobs.MICRO_BATCHES)
    expected, *others = (
        pools(2).run(parallel_jobs.pipeline, config, STEPS, True, way=way) for way in ("config", "object", "callable")
    )
    for traces in others:
        for found, wanted in zip(traces, expected, strict=True):
            assert found.losses == wanted.losses
            assert np.array_equal(found.end, wanted.end)
            assert found.metrics["root_updates"] == wanted.metrics["root_updates"]


@pytest.mark.parametrize("stage", [0, 2])
def test_experts(pools: Pools, stage: int) -> None:
    config = engine_config(SHAMPOO, stage, 2)
    expected, *others = (
        pools(2).run(parallel_jobs.experts, config, STEPS, 2, way=way) for way in ("config", "object", "callable")
    )
    for traces in others:
        for found, wanted in zip(traces, expected, strict=True):
            assert found.losses == wanted.losses
            assert np.array_equal(found.end, wanted.end)


@pytest.mark.parametrize("stage", [0, 2])
def test_experts_among_others_are_refused(pools: Pools, stage: int) -> None:
    job, config = parallel_jobs.experts, engine_config(SHAMPOO, stage, 2)
    for text in pools(2).run(binding_jobs.message, job, config, 1, 2, way="object", split=False):
        assert text.startswith("param group 0 has experts of ep_size_2, which need groups of their own")
        assert "split_params_into_different_moe_groups_for_optimizer" in text
