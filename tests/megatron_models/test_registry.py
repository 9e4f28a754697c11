"""Shampoo by Megatron's registry of optimizers, where the installed release has one; the same as without it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("megatron.core")
from tests.megatron_models import training
from tests.megatron_models.test_training import FP32, Pools

HAS_REGISTRY = importlib.util.find_spec("megatron.core.optimizer.emerging_optimizers") is not None
only_with_registry = pytest.mark.skipif(not HAS_REGISTRY, reason="Megatron before 0.18 has no registry of optimizers")


def registers(settings: dict[str, Any]) -> bool | str:
    from ds_shampoo.megatron import register_emerging_optimizer

    try:
        return register_emerging_optimizer(**settings)
    except ValueError as error:
        return str(error)


def test_it_says_whether_there_is_a_registry(pools: Pools) -> None:
    assert pools(1).run(registers, {"block_size": 16}) == [HAS_REGISTRY]


def test_a_wrong_key_is_refused_at_once(pools: Pools) -> None:
    (message,) = pools(1).run(registers, {"block_sise": 16})
    assert "'block_sise' = 16: unknown key; did you mean 'block_size'" in str(message)


@only_with_registry
@pytest.mark.parametrize(("tensor_parallel", "how"), [(1, {}), (2, {"clip": 1.0}), (1, {"bf16": True})])
def test_the_trajectory_of_the_other_way(pools: Pools, tensor_parallel: int, how: dict[str, Any]) -> None:
    direct = pools(2).run(training.job, 12, tensor_parallel, **how)
    registered = pools(2).run(training.job, 12, tensor_parallel, **how, registered=True)
    for one, other in zip(direct, registered, strict=True):
        assert other.losses == pytest.approx(one.losses, rel=FP32)
    assert {n for r in direct for n in r.preconditioned} == {n for r in registered for n in r.preconditioned} != set()


@only_with_registry
@pytest.mark.parametrize("how", [{}, {"bf16": True}], ids=["fp32", "bf16"])
def test_it_resumes_bit_for_bit(pools: Pools, tmp_path: Path, how: dict[str, Any]) -> None:
    saved = {"folder": str(tmp_path), "save_at": 4, "registered": True, **how}
    straight = pools(2).run(training.job, 10, **saved)
    resumed = pools(2).run(training.job, 10, **saved, resume=True)
    for before, after in zip(straight, resumed, strict=True):
        assert before.losses[4:] == after.losses
        assert all(np.array_equal(before.end[name], value) for name, value in after.end.items())


def refusal(**how: Any) -> str:
    try:
        training.prepared(registered=True, **how)
    except ValueError as error:
        return str(error)
    return ""


@only_with_registry
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"distributed": True}, "config.use_distributed_optimizer = True with optimizer"),
        ({"layer_wise": True}, "config.use_layer_wise_distributed_optimizer = True with optimizer"),
        ({"experts": 4, "expert_parallel": 2}, "expert_model_parallel_size > 1 with optimizer"),
        ({"settings": {"lr": 0.01, "decoupled_weight_decay": False}}, "under Megatron set config"),
    ],
)
def test_refusals(pools: Pools, how: dict[str, Any], message: str) -> None:
    for found in pools(2).run(refusal, **how):
        assert message in found
