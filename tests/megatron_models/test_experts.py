"""Megatron's expert parallelism under DeepSpeed: one trajectory, and every expert's copies equal to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from ds_shampoo.frameworks.deepspeed.experts import global_name
from ds_shampoo.sharding.model_order import model_order
from tests.distributed.jobs import engine_config
from tests.distributed.pool import WorkerPool
from tests.distributed.test_parity import FP32

pytest.importorskip("megatron.core")
from tests.megatron_models import expert_jobs
from tests.megatron_models.jobs import SETTINGS, Run

Pools = Callable[[int], WorkerPool]
STEPS = 20
EXPERT = "decoder.layers.1.mlp.experts.local_experts.{}.linear_fc1.weight"
_references: dict[str, Run] = {}


def run(pools: Pools, ranks: int, stage: int, steps: int = STEPS, tensor_parallel: int = 1, **more: Any) -> list[Run]:
    clip, precision = more.pop("clip", 0.0), more.pop("precision", "fp32")
    config = engine_config(
        SETTINGS, stage, ranks // tensor_parallel, precision=precision, gradient_clipping=clip, **more.pop("other", {})
    )
    return pools(ranks).run(expert_jobs.job, config, steps, min(2, ranks), tensor_parallel, **more)


def reference(pools: Pools, clip: float = 0.0) -> Run:
    """All experts in one process."""
    if str(clip) not in _references:
        (_references[str(clip)],) = run(pools, 1, 0, clip=clip)
    return _references[str(clip)]


def check(runs: list[Run], expected: Run) -> None:
    moved = sum(float(np.sum((expected.end[n] - expected.start[n]) ** 2)) for n in expected.end) ** 0.5
    for found in runs:
        assert found.losses == pytest.approx(expected.losses, rel=FP32)
        for name, value in found.end.items():
            if value.shape == expected.end[name].shape:
                assert float(np.linalg.norm(value - expected.end[name])) <= FP32 * moved
            twins = [r.end[name] for r in runs if r.tensor_rank == found.tensor_rank and name in r.end]
            assert all(np.array_equal(value, twin) for twin in twins)
    assert {name for r in runs for name in r.end} == set(expected.end)
    assert {name for r in runs for name in r.preconditioned} == set(expected.preconditioned) != set()


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("ranks", [2, 4])
def test_one_trajectory(pools: Pools, ranks: int, stage: int) -> None:
    runs = run(pools, ranks, stage)
    check(runs, reference(pools))
    for number in range(expert_jobs.EXPERTS):
        assert sum(EXPERT.format(number) in r.end for r in runs) == ranks // 2


def test_clipped_by_the_norm_over_all_experts(pools: Pools) -> None:
    clipped = reference(pools, clip=0.5)
    assert clipped.losses[-1] != reference(pools).losses[-1]
    check(run(pools, 4, 1, clip=0.5), clipped)


def test_sliced_experts(pools: Pools) -> None:
    check(run(pools, 4, 1, tensor_parallel=2), reference(pools))


def test_through_deepspeeds_own_initialize(pools: Pools) -> None:
    config = engine_config(SETTINGS, 1, 2)
    for found in pools(2).run(expert_jobs.registered, config, STEPS):
        assert found.losses == pytest.approx(reference(pools).losses, rel=FP32)


def test_bf16_trains(pools: Pools) -> None:
    runs = run(pools, 2, 1, 8, precision="bf16", other={"data_types": {"grad_accum_dtype": "fp32"}})
    assert runs[0].losses[-1] < runs[0].losses[0]
    assert sum(r.metrics["roots_rejected"] for r in runs) == 0


@pytest.mark.parametrize(("ranks", "stage", "tensor_parallel"), [(2, 0, 1), (4, 1, 2)])
def test_it_resumes_bit_for_bit(pools: Pools, tmp_path: Path, ranks: int, stage: int, tensor_parallel: int) -> None:
    common = {"folder": str(tmp_path), "save_at": 7, "tensor_parallel": tensor_parallel}
    straight = run(pools, ranks, stage, 14, **common)
    resumed = run(pools, ranks, stage, 14, resume=True, **common)
    for before, after in zip(straight, resumed, strict=True):
        assert before.losses[7:] == after.losses
        assert all(np.array_equal(before.end[name], value) for name, value in after.end.items())


@pytest.mark.parametrize("options", [{"load_module_only": True}, {"load_optimizer_states": False}], ids=str)
def test_every_rank_gets_its_own_experts_weights(pools: Pools, tmp_path: Path, options: dict[str, Any]) -> None:
    saved = run(pools, 2, 1, 3, folder=str(tmp_path), save_at=3)
    loaded = run(pools, 2, 1, 3, folder=str(tmp_path), save_at=3, resume=True, load=options)
    for before, after in zip(saved, loaded, strict=True):
        assert all(np.array_equal(before.end[name], value) for name, value in after.end.items())


def test_damaged_weights_are_refused_before_anything_is_loaded(pools: Pools, tmp_path: Path) -> None:
    run(pools, 2, 1, 1, folder=str(tmp_path), save_at=1)
    (damaged, _) = sorted(tmp_path.glob("*/shampoo/experts-*"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    for options in ({}, {"load_module_only": True}):
        for message in pools(2).run(
            expert_jobs.refused, engine_config(SETTINGS, 1, 2), 2, 1, str(tmp_path), 1, True, options
        ):
            assert f"{damaged} is damaged" in message
    for path in tmp_path.glob("*/shampoo/*"):
        path.unlink()
    damaged.parent.rmdir()
    for message in pools(2).run(expert_jobs.refused, engine_config(SETTINGS, 1, 2), 2, 1, str(tmp_path), 1, True):
        assert "its folder shampoo/ is missing" in message


def test_another_expert_parallel_size_is_refused(pools: Pools, tmp_path: Path) -> None:
    run(pools, 2, 1, 1, folder=str(tmp_path), save_at=1)
    for message in pools(2).run(expert_jobs.refused, engine_config(SETTINGS, 1, 2), 1, 1, str(tmp_path), 1, True):
        assert "experts lay over ['ep_size_2'] when this was saved, and lie over [] now" in message


def test_stage_3_is_refused(pools: Pools) -> None:
    for message in pools(2).run(expert_jobs.refused, engine_config(SETTINGS, 3, 2), 2):
        assert "zero_optimization.stage = 3 with expert model parallelism of Megatron" in message


def test_what_deepspeed_was_not_told_is_refused(pools: Pools) -> None:
    for message in pools(2).run(expert_jobs.unregistered, engine_config(SETTINGS, 1, 2)):
        assert "call ds_shampoo.initialize with mpu=ds_shampoo.megatron.mpu" in message


def test_experts_in_other_slices_than_the_rest_are_refused(pools: Pools) -> None:
    for message in pools(2).run(expert_jobs.mismatched):
        assert message.startswith("expert_tensor_parallel_size = 1 at tensor_model_parallel_size = 2")


def test_names_of_all_ranks_in_the_models_order() -> None:
    def of_rank(rank: int) -> list[str]:
        experts = [
            f"{layer}.local_experts.{rank * 2 + e}.{w}" for layer in "ab" for e in (0, 1) for w in ("up", "down")
        ]
        return ["first", *experts[:4], "between", *experts[4:], "last"]

    whole = [f"{layer}.local_experts.{e}.{w}" for layer in "ab" for e in range(4) for w in ("up", "down")]
    assert model_order(of_rank(0) + of_rank(1)) == ["first", *whole[:8], "between", *whole[8:], "last"]


def test_fused_experts_are_refused() -> None:
    model = nn.Linear(2, 2)
    model.weight.allreduce, model.weight.group_name = False, "ep_size_2"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"does not tell which expert's: with Megatron leave moe_grouped_gemm out"):
        global_name(model, "mlp.experts.weight1", model.weight)
