"""One trajectory at any tensor-parallel size: real Megatron models under DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.jobs import SHAMPOO, engine_config
from tests.distributed.pool import WorkerPool
from tests.distributed.test_parity import BY_ROLE, FP32

pytest.importorskip("megatron.core")
from tests.megatron_models import jobs
from tests.megatron_models.jobs import SETTINGS, Run

Pools = Callable[[int], WorkerPool]
STEPS = 20


def run(pools: Pools, world_size: int, tensor_parallel: int, stage: int, steps: int = STEPS, **more: Any) -> list[Run]:
    settings = {**SETTINGS, **more.pop("settings", {})}
    config = engine_config(settings, stage, world_size // tensor_parallel, precision=more.pop("precision", "fp32"))
    return pools(world_size).run(jobs.job, config, steps, tensor_parallel, **more)


SHAPES = [{}, {"gated": True}, {"kind": "bert"}]
IDS = ["gpt", "gated", "bert"]
_references: dict[str, Run] = {}


def reference(pools: Pools, shape: dict[str, Any], **more: Any) -> Run:
    key = f"{shape}{more}"
    if key not in _references:
        (_references[key],) = run(pools, 1, 1, 0, **shape, **more)
    return _references[key]


def check(runs: list[Run], expected: Run) -> None:
    """The losses of the whole model, and every part of its weights that a rank holds whole, to rounding."""
    moved = sum(float(np.sum((expected.end[n] - expected.start[n]) ** 2)) for n in expected.end) ** 0.5
    for found in runs:
        assert found.losses == pytest.approx(expected.losses, rel=FP32)
        for name, value in found.end.items():
            if value.shape == expected.end[name].shape:
                assert float(np.linalg.norm(value - expected.end[name])) <= FP32 * moved
            twins = [other.end[name] for other in runs if other.tensor_rank == found.tensor_rank]
            assert all(np.array_equal(value, twin) for twin in twins)
    assert {name for r in runs for name in r.preconditioned} == set(expected.preconditioned) != set()
    assert all(r.metrics["root_updates"] > 0 for r in runs)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
@pytest.mark.parametrize(("world_size", "stage"), [(2, 0), (4, 1), (4, 2), (4, 3)])
def test_one_trajectory(pools: Pools, shape: dict[str, Any], world_size: int, stage: int) -> None:
    runs = run(pools, world_size, 2, stage, **shape)
    check(runs, reference(pools, shape))
    for name in ("decoder.layers.0.input_layernorm.weight", "encoder.layers.0.input_layernorm.weight"):
        copies = [r.end[name] for r in runs if name in r.end]
        assert all(np.array_equal(copy, copies[0]) for copy in copies)  # TP-replicated: to the bit


@pytest.mark.parametrize("kind", ["gpt", "bert"])
@pytest.mark.parametrize(("world_size", "stage"), [(2, 0), (4, 2), (4, 3)])
def test_settings_by_role(pools: Pools, kind: str, world_size: int, stage: int) -> None:
    shared = {"kind": kind, "settings": BY_ROLE}
    check(run(pools, world_size, 2, stage, **shared), reference(pools, {}, **shared))


@pytest.mark.parametrize(("world_size", "stage"), [(2, 0), (2, 2), (4, 3)])
def test_more_ranks_than_query_groups(pools: Pools, world_size: int, stage: int) -> None:
    """One group of keys and values for all heads, so that the slices' border falls among its queries."""
    shared = {"num_query_groups": 1, "settings": {"preconditioner": "shampoo", "block_size": 8}}
    check(run(pools, world_size, 2, stage, **shared), reference(pools, {}, **shared))


@pytest.mark.parametrize(("world_size", "stage"), [(2, 0), (2, 1), (4, 3)])
def test_sequence_parallelism(pools: Pools, world_size: int, stage: int) -> None:
    by_hand = stage == 0  # and then once more by the mpu, which must not sum twice
    runs = run(pools, world_size, 2, stage, sequence_parallel=True, by_hand=by_hand)
    assert all((r.summed > 0) == by_hand for r in runs)
    check(runs, reference(pools, {}))


def test_without_the_sum_copies_would_drift_apart(pools: Pools) -> None:
    first, second = run(pools, 2, 2, 1, sequence_parallel=True, summed=False)
    name = "decoder.layers.0.input_layernorm.weight"
    assert np.abs(first.end[name] - second.end[name]).max() > 1e-3


@pytest.mark.parametrize("stage", [1, 3])
def test_it_resumes_bit_for_bit(pools: Pools, tmp_path: Path, stage: int) -> None:
    blocked = {"settings": {"embedding": "blocked"}}  # position embeddings: preconditioned, and whole on every rank
    straight = run(pools, 4, 2, stage, 14, folder=str(tmp_path), save_at=7, **blocked)
    resumed = run(pools, 4, 2, stage, 14, folder=str(tmp_path), save_at=7, resume=True, **blocked)
    for before, after in zip(straight, resumed, strict=True):
        assert before.losses[7:] == after.losses
        assert all(np.array_equal(before.end[name], value) for name, value in after.end.items())


def test_another_tensor_parallel_size_is_refused(pools: Pools, tmp_path: Path) -> None:
    run(pools, 2, 2, 0, 2, folder=str(tmp_path), save_at=1)
    for message in pools(2).run(refused, engine_config(SHAMPOO, 0, 2), str(tmp_path)):
        assert "saved at tensor-parallel size 2, to be loaded at 1" in message


@pytest.mark.parametrize("grafting", ["adam_normalized", "rmsprop_normalized"])
def test_norms_of_slices_are_refused(pools: Pools, grafting: str) -> None:
    for message in pools(2).run(refused, engine_config({**SHAMPOO, "grafting": grafting}, 1, 1), "", 2):
        assert f"'grafting' = '{grafting}'" in message


def refused(config: dict[str, Any], folder: str, tensor_parallel: int = 1) -> str:
    try:
        jobs.job(config, 2, tensor_parallel, folder=folder, save_at=1, resume=bool(folder))
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def test_bf16_trains(pools: Pools) -> None:
    runs = run(pools, 2, 2, 1, 8, precision="bf16")
    assert runs[0].losses[-1] < runs[0].losses[0]
    assert sum(r.metrics["roots_rejected"] for r in runs) == 0
