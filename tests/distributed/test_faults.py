"""Overflow, checkpoints and refusals under the real engine."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from ds_shampoo.algorithm import multi_tensor
from ds_shampoo.algorithm.multi_tensor import TorchKernels
from tests.distributed import jobs
from tests.distributed.jobs import SHAMPOO, Trace, engine_config
from tests.distributed.pool import WorkerPool
from tests.distributed.test_parity import FP32

Pools = Callable[[int], WorkerPool]
Straight = Callable[[dict[str, Any]], list[Trace]]


@pytest.fixture(scope="module")
def straight(pools: Pools) -> Straight:
    """What two ranks make of a config in 12 steps where nothing happens to them; run once for all tests."""

    @functools.cache
    def run(config: str) -> list[Trace]:
        return pools(2).run(jobs.job, json.loads(config), 12)

    return lambda config: run(json.dumps(config, sort_keys=True))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_overflow_leaves_every_state_untouched(pools: Pools, stage: int) -> None:
    config = engine_config(SHAMPOO, stage, 2, precision="fp16", gradient_clipping=1.0)
    config["fp16"] |= {"initial_scale_power": 24, "hysteresis": 1}
    for skipped, untouched, losses in pools(2).run(jobs.overflowing, config, 20):
        assert skipped >= 3
        assert untouched
        assert losses[-1] < losses[0]


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("precision", "stage", "other"),
    [
        ("fp32", 1, {}),
        ("fp32", 2, {}),
        ("fp32", 3, {}),
        ("bf16", 0, {}),
        ("bf16", 1, {}),
        ("bf16", 1, {"data_types": {"grad_accum_dtype": "fp32"}}),
        ("bf16", 2, {}),
        ("bf16", 3, {}),
        ("fp16", 2, {}),
    ],
    ids=["fp32-1", "fp32-2", "fp32-3", "bf16-0", "bf16-1", "bf16-1-BF16_Optimizer", "bf16-2", "bf16-3", "fp16-2"],
)
def test_a_gradient_that_is_not_finite_leaves_every_state_untouched(
    pools: Pools, straight: Straight, precision: str, stage: int, other: dict[str, Any], factor: float
) -> None:
    config = engine_config(SHAMPOO, stage, 2, precision=precision, **other)
    if precision == "fp16":
        config["fp16"]["loss_scale"] = 2**jobs.LOSS_SCALE_POWER  # a scale that moves would round otherwise
    poisoned = pools(2).run(jobs.poisoned, config, 12, 6, factor)
    for (untouched, skipped, trace), expected in zip(poisoned, straight(config), strict=True):
        assert untouched
        assert skipped == 1
        assert trace.losses == expected.losses
        assert np.array_equal(trace.end, expected.end)


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16")])
def test_offload_states_and_back_changes_nothing(pools: Pools, straight: Straight, stage: int, precision: str) -> None:
    config = engine_config(SHAMPOO, stage, 2, precision=precision)
    for trace, expected in zip(pools(2).run(jobs.set_aside, config, 12, 6), straight(config), strict=True):
        assert trace.losses == expected.losses
        assert np.array_equal(trace.end, expected.end)


SLEEPING = {"lr": 0.01, "root_interval": 5, "matrix_epsilon": 1e-3}


@functools.cache
def sleeping_alone(unused: bool) -> Trace:
    return jobs.sleeping(None, SLEEPING, 120, 100, unused)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("unused", [False, True], ids=["zero", "none"])
def test_a_parameter_without_gradient_for_100_steps(pools: Pools, stage: int, unused: bool) -> None:
    """It stays where it is, has no root, and is preconditioned soon after it takes part."""
    expected = sleeping_alone(unused)
    config = engine_config(SLEEPING, stage, 2, size=8)
    for trace in pools(2).run(jobs.sleeping, config, SLEEPING, 120, 100, unused):
        assert trace.losses == pytest.approx(expected.losses, rel=FP32)
        assert trace.metrics["roots_rejected"] == 0
    assert expected.metrics["preconditioned_blocks"] == 2
    # Each step has a small batch of its own, whose losses differ by a factor of three.
    assert np.mean(expected.losses[-5:]) < np.mean(expected.losses[95:100])


@pytest.mark.parametrize(
    ("stage", "precision", "other"),
    [
        (1, "fp32", {}),
        (1, "bf16", {}),
        (2, "fp32", {"root_refresh_threshold": 0.2}),
        (2, "fp16", {}),
        (3, "fp32", {}),
        (3, "bf16", {}),
    ],
)
def test_a_checkpoint_resumes_bit_for_bit(
    pools: Pools, tmp_path: Path, stage: int, precision: str, other: dict[str, Any]
) -> None:
    config = engine_config({**SHAMPOO, **other}, stage, 2, precision=precision)
    for before, after, same_end, same_state in pools(2).run(jobs.resumed, config, str(tmp_path), 7, 14):
        assert before == after
        assert same_end
        assert same_state


def test_one_rank_resumes_at_stage_0(pools: Pools, tmp_path: Path) -> None:
    ((before, after, same_end, same_state),) = pools(1).run(
        jobs.resumed, engine_config(SHAMPOO, 0, 1), str(tmp_path), 4, 8
    )
    assert before == after
    assert same_end
    assert same_state


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 0), ("fp32", 3), ("bf16", 3)])
def test_a_frozen_group(pools: Pools, tmp_path: Path, precision: str, stage: int) -> None:
    config = engine_config(SHAMPOO, stage, 2, precision=precision)
    straight = pools(2).run(jobs.saving, config, str(tmp_path), 6, 12, jobs.a_frozen_group)
    assert all(trace.metrics["statistics_ms"] > 0 for trace in straight)  # the step is known to be over
    resumed = pools(2).run(jobs.loading, config, str(tmp_path), 6, 12, jobs.a_frozen_group)
    for before, after in zip(straight, resumed, strict=True):
        assert np.array_equal(before.end, after.end)
    assert sum(trace.extra["in_force"] for trace in resumed) > 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("matrices", [0, 1, 2])
def test_fewer_blocks_than_ranks(pools: Pools, stage: int, matrices: int) -> None:
    """Ranks without a block, and at stages 1 and 2 without any element of a matrix, take their part all the same."""
    config = engine_config({"lr": 0.02, "root_interval": 2}, stage, 4)
    results = pools(4).run(jobs.tiny, config, 12, matrices)
    for losses, metrics in results:
        assert losses == results[0][0]
        assert losses[-1] < losses[0]
        assert metrics["roots_rejected"] == 0
    assert sum(metrics["preconditioned_blocks"] for _, metrics in results) == matrices


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"fp16": {"enabled": True}}, "fp16.enabled = true at zero_optimization.stage = 0"),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}},
            'zero_optimization.offload_optimizer.device = "nvme"',
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
            "zero_optimization.zero_hpz_partition_size > 1",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}},
            "zero_optimization.zero_quantized_weights or zero_quantized_gradients = true",
        ),
        (
            {"zero_optimization": {"stage": 1, "elastic_checkpoint": True}},
            "zero_optimization.elastic_checkpoint = true",
        ),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "torch_autocast.enabled = true"),
        ({"compile": {"deepcompile": True}}, "compile.deepcompile = true"),
        ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation = false"),
        ({"sequence_parallel_size": 2, "data_parallel_size": 1}, "sequence parallelism"),
        (
            {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}, "zero_optimization": {"stage": 2}},
            "bf16.bf16_master_weights_and_grads = true",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "super_offload": True}}},
            "zero_optimization.offload_optimizer.super_offload = true",
        ),
        (
            {
                "zero_optimization": {
                    "stage": 2,
                    "zenflow": {"topk_ratio": 0.1, "update_interval": 4},
                    "offload_optimizer": {"device": "cpu"},
                }
            },
            "zero_optimization.zenflow",
        ),
        ({"checkpoint": {"use_node_local_storage": True}}, "checkpoint.use_node_local_storage = true"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal = true at zero_optimization.stage = 0"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value.split(" = ")[0],
)
def test_what_is_not_supported_is_refused_by_name(pools: Pools, change: dict[str, Any], named: str) -> None:
    if "torch_autocast" in change and not hasattr(DeepSpeedEngine, "torch_autocast_enabled"):
        pytest.skip("this DeepSpeed has no torch_autocast section")
    config = {**engine_config(SHAMPOO, 0, 2), **change}
    for message in pools(2).run(jobs.refused, config):
        assert named in message


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"root_intervall": 5}, "'root_intervall' = 5: unknown key; did you mean 'root_interval'?"),
        ({"block_size": 0}, "'block_size' = 0"),
        ({"betas": [0.9, 1.0]}, r"'betas[1]' = 1.0"),
        ({"lr": "fast"}, "'lr' = 'fast'"),
        ({"root_delay": 30}, "'root_delay' = 30: must be at most root_interval"),
    ],
)
def test_a_wrong_setting_is_refused_before_anything_starts(pools: Pools, params: dict[str, Any], named: str) -> None:
    for message in pools(1).run(jobs.refused, engine_config(params, 2, 1)):
        assert named in message


def with_apex_on_one_rank(config: dict[str, Any]) -> str:
    class Other(TorchKernels):
        """What an apex that only one rank found would be."""

    found = Other() if dist.get_rank() else TorchKernels()
    with mock.patch.object(multi_tensor, "kernels_for", return_value=found):
        try:
            jobs.job(config, 1)
        except RuntimeError as error:
            return str(error)
    return ""


def test_ranks_that_round_otherwise_are_refused(pools: Pools) -> None:
    for message in pools(2).run(with_apex_on_one_rank, engine_config(SHAMPOO, 0, 2)):
        assert "disagree about using NVIDIA's apex" in message
