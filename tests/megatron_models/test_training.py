"""Megatron's own training with Shampoo: one trajectory whatever its optimizers do to the parameters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.jobs import engine_config
from tests.distributed.pool import WorkerPool
from tests.distributed.test_parity import BY_ROLE, FP32

pytest.importorskip("megatron.core")
from tests.megatron_models import jobs, training
from tests.megatron_models.jobs import SETTINGS
from tests.megatron_models.training import Run

Pools = Callable[[int], WorkerPool]
STEPS = 20
WHOLE_LOOP = {"clip": 1.0, "schedule": True}
_references: dict[str, Run] = {}


def reference(pools: Pools, **shape: Any) -> Run:
    key = str(shape)
    if key not in _references:
        (_references[key],) = pools(1).run(training.job, STEPS, **shape)
    return _references[key]


def check(runs: list[Run], expected: Run) -> None:
    """The whole model's losses, gradient norms and rates, its whole weights to rounding, and all its blocks."""
    for found in runs:
        assert found.losses == pytest.approx(expected.losses, rel=FP32)
        assert found.norms == pytest.approx(expected.norms, rel=1e-4)
        assert found.rates == expected.rates
        for name, value in found.end.items():
            twins = [r.end[name] for r in runs if r.tensor_rank == found.tensor_rank and name in r.end]
            assert all(np.array_equal(value, twin) for twin in twins), name
            if value.shape == expected.end[name].shape:
                assert np.abs(value - expected.end[name]).max() <= 1e-5, name
    assert {name for r in runs for name in r.preconditioned} == set(expected.preconditioned) != set()
    assert sum(r.metrics["root_updates"] for r in runs) > 0


@pytest.mark.parametrize(
    ("ranks", "tensor_parallel", "how"),
    [
        (2, 1, {}),
        (2, 1, {"distributed": True}),
        (2, 1, {"layer_wise": True}),
        (4, 2, {"distributed": True}),
        (2, 2, {"sequence_parallel": True}),
    ],
    ids=["dp", "distributed", "layer-wise", "tp-distributed", "tp-sequence"],
)
def test_one_trajectory(pools: Pools, ranks: int, tensor_parallel: int, how: dict[str, Any]) -> None:
    check(pools(ranks).run(training.job, STEPS, tensor_parallel, **WHOLE_LOOP, **how), reference(pools, **WHOLE_LOOP))


@pytest.mark.parametrize(
    ("ranks", "tensor_parallel", "how"),
    [(2, 1, {}), (2, 1, {"layer_wise": True}), (4, 2, {"distributed": True}), (2, 1, {"pipeline_parallel": 2})],
    ids=["dp", "layer-wise", "tp-distributed", "pipeline"],
)
def test_settings_by_role(pools: Pools, ranks: int, tensor_parallel: int, how: dict[str, Any]) -> None:
    """Its schedule writes every group's rate and decay; scales hold of the rate, and roles' own decays go before."""
    shared = {**WHOLE_LOOP, "by_name": "pipeline_parallel" in how}
    settings = {"settings": {**BY_ROLE, "vector_eps": 1e-6}}  # keys' biases have no gradient but rounding
    expected = reference(pools, **shared, **settings)
    check(pools(ranks).run(training.job, STEPS, tensor_parallel, **shared, **settings, **how), expected)
    usual = reference(pools, **shared).end
    for name in ("embedding.word_embeddings.weight", "output_layer.weight", "decoder.final_layernorm.weight"):
        assert np.abs(expected.end[name] - usual[name]).max() > 1e-3, name


def test_more_ranks_than_query_groups(pools: Pools, tmp_path: Path) -> None:
    """The slices' border falls within the one group; a checkpoint goes from one size to the other."""
    shared = {"num_query_groups": 1, "settings": {"block_size": 8}, "folder": str(tmp_path), "save_at": 4}
    (whole,) = pools(1).run(training.job, 10, distributed=True, **shared)
    halves = pools(2).run(training.job, 10, 2, distributed=True, **shared, resume=True)
    assert halves[0].losses == pytest.approx(whole.losses[4:], rel=FP32)
    assert {n for r in halves for n in r.preconditioned} == set(whole.preconditioned)


@pytest.mark.parametrize("how", [{}, {"distributed": True}], ids=["dp", "distributed"])
def test_pipelines(pools: Pools, how: dict[str, Any]) -> None:
    runs = pools(2).run(training.job, STEPS, pipeline_parallel=2, by_name=True, clip=1.0, **how)
    check(runs, reference(pools, by_name=True, clip=1.0))


@pytest.mark.parametrize(("ranks", "how"), [(2, {}), (4, {"distributed": True})], ids=["every-rank-its-own", "sharded"])
def test_experts(pools: Pools, ranks: int, how: dict[str, Any]) -> None:
    runs = pools(ranks).run(training.job, STEPS, experts=4, expert_parallel=2, by_name=True, **how)
    check(runs, reference(pools, experts=4, by_name=True))
    assert all(r.metrics["expert_root_updates"] > 0 for r in runs)


def test_deepspeed_follows_the_same(pools: Pools) -> None:
    """Its stage 2 against the distributed optimizer: 2 ranks each, flat shards cut at other places."""
    config = {**engine_config(SETTINGS, 2, 2), "gradient_clipping": 1.0}
    ours = pools(2).run(training.job, STEPS, distributed=True, clip=1.0)
    deepspeeds = pools(2).run(jobs.job, config, STEPS, 1)
    for megatrons, other in zip(ours, deepspeeds, strict=True):
        assert megatrons.losses == pytest.approx(other.losses, rel=FP32)
        assert all(np.abs(value - other.end[name]).max() <= 1e-5 for name, value in megatrons.end.items())
    assert {name for r in ours for name in r.preconditioned} == {n for r in deepspeeds for n in r.preconditioned}


def test_half_precision(pools: Pools) -> None:
    """Gradients are summed in fp32, so where the fp32 copies lie changes nothing beyond its rounding."""
    kinds = [{}, {"distributed": True}, {"layer_wise": True}]
    runs = [pools(2).run(training.job, 8, bf16=True, **how)[0] for how in kinds]
    assert runs[0].losses[-1] < runs[0].losses[0]
    for other in runs[1:]:
        assert other.losses == pytest.approx(runs[0].losses, rel=FP32)


SHARDED = {"distributed": True}
PIPELINE = {"pipeline_parallel": 2, "by_name": True}
EXPERTS = {"experts": 4, "expert_parallel": 2, "by_name": True}


@pytest.mark.parametrize(
    ("how", "others"),
    [
        ({}, [(1, {}), (4, {"tensor_parallel": 2})]),
        (SHARDED, [(1, SHARDED), (4, {**SHARDED, "tensor_parallel": 2})]),
        ({**SHARDED, **PIPELINE}, [(1, {**SHARDED, "by_name": True})]),
        ({**SHARDED, **EXPERTS}, [(4, {**SHARDED, **EXPERTS})]),
        ({**SHARDED, "sharding": "dp_reshardable"}, []),
        ({**SHARDED, "bf16": True}, []),
        ({"layer_wise": True, "bf16": True}, []),
        ({**SHARDED, "settings": {"preconditioner": "spectral", "root_dtype": "bfloat16"}}, []),
        ({**SHARDED, "settings": {"preconditioner": "polar"}}, []),
        ({**SHARDED, "settings": BY_ROLE}, [(4, {**SHARDED, "tensor_parallel": 2, "settings": BY_ROLE})]),
    ],
    ids=[
        *("dp", "distributed", "pipeline", "experts"),
        *("distributed-buckets", "distributed-bf16", "layer-wise-bf16", "spectral-bf16-roots", "polar", "by-role"),
    ],
)
def test_it_resumes_bit_for_bit(
    pools: Pools, tmp_path: Path, how: dict[str, Any], others: list[tuple[int, dict[str, Any]]]
) -> None:
    """Saved with jobs under way; a replicated or fully reshardable one is taken up by other ranks too."""
    saved = {"folder": str(tmp_path), "save_at": 4}
    straight = pools(2).run(training.job, 10, **saved, **how)
    resumed = pools(2).run(training.job, 10, **saved, **how, resume=True)
    for before, after in zip(straight, resumed, strict=True):
        assert before.losses[4:] == after.losses
        assert all(np.array_equal(before.end[name], value) for name, value in after.end.items())
    for ranks, other in others:
        moved = pools(ranks).run(training.job, 10, **saved, **other, resume=True)
        assert moved[0].losses == pytest.approx(straight[0].losses[4:], rel=FP32)
        assert {n for r in moved for n in r.preconditioned} == {n for r in straight for n in r.preconditioned}


def refusal(settings: dict[str, Any] | None = None, tensor_parallel: int = 1, **how: Any) -> str:
    try:
        training.prepared(tensor_parallel, settings, **how)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"block_sise": 4},), "'block_sise' = 4: unknown key; did you mean 'block_size'"),
        (({"decoupled_weight_decay": False},), "'decoupled_weight_decay' = False: under Megatron set config"),
        (
            ({"roles": {"decoder.layers.2.*": "none"}},),
            "'roles' has the pattern 'decoder.layers.2.*', which matches no",
        ),
        (({"grafting": "adam_normalized"}, 2), "grafting = 'adam_normalized' under tensor parallelism"),
    ],
)
def test_refusals(pools: Pools, arguments: tuple[Any, ...], message: str) -> None:
    assert all(message in found for found in pools(2).run(refusal, *arguments))


def test_patterns_are_about_the_undivided_model(pools: Pools) -> None:
    """Each matches on one pipeline stage, or among the experts or the other weights only."""
    roles = {f"decoder.layers.{layer}.*": "none" for layer in range(2)}
    assert pools(2).run(refusal, {"roles": roles}, pipeline_parallel=2) == ["", ""]
    experts = {"roles": {"*.local_experts.3.*": "none", "*.linear_qkv.weight": "none"}}
    assert pools(2).run(refusal, experts, experts=4, expert_parallel=2) == ["", ""]


def test_layer_wise_and_distributed_at_once(pools: Pools) -> None:
    for found in pools(2).run(refusal, layer_wise=True, distributed=True):
        assert "layer_wise_distributed_optimizer = True with config.use_distributed_optimizer = True" in found


def test_the_undistributed_format(pools: Pools) -> None:
    ((same, error, strange),) = pools(1).run(training.undistributed)
    assert same
    assert error == ""
    assert "it has no 'shampoo'" in strange
    for _, error, _ in pools(2).run(training.undistributed):
        assert "ckpt_format = 'torch'" in error
