"""Pipelines and mixtures of experts: every rank's part follows the single-process run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from ds_shampoo.frameworks.deepspeed.universal import to_universal
from ds_shampoo.state.files import CheckpointError
from tests.distributed import parallel_jobs
from tests.distributed.jobs import SHAMPOO, Trace, engine_config
from tests.distributed.pool import WorkerPool
from tests.distributed.test_parity import BY_ROLE, FP32

Pools = Callable[[int], WorkerPool]
STEPS = 20


def apart(found: dict[str, np.ndarray], expected: Trace) -> float:
    """The distance of some parameters from those of the reference, relative to how far all of these moved."""
    difference = sum(np.sum((value - expected.extra["end"][name]) ** 2) for name, value in found.items())
    moved = sum(np.sum((expected.extra["end"][n] - expected.extra["start"][n]) ** 2) for n in found)
    return float(difference / moved) ** 0.5


@functools.cache
def in_one_process(tied: bool, by_role: bool = False) -> Trace:
    return parallel_jobs.sequential({**SHAMPOO, **(BY_ROLE if by_role else {})}, STEPS, tied)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("by_role", [False, True], ids=["", "by-role"])
def test_pipeline(pools: Pools, stage: int, tied: bool, by_role: bool) -> None:
    settings = {**SHAMPOO, **(BY_ROLE if by_role else {})}
    config = engine_config(settings, stage, 2, parallel_jobs.MICRO_BATCHES)
    expected = in_one_process(tied, by_role)
    traces = pools(4).run(parallel_jobs.pipeline, config, STEPS, tied)
    assert {trace.extra["stage"] for trace in traces} == {0, 1}
    assert sum(t.metrics["preconditioned_blocks"] for t in traces) == expected.metrics["preconditioned_blocks"] > 0
    assert sum(t.metrics["root_updates"] for t in traces) == expected.metrics["root_updates"]
    shared = []
    for trace in traces:
        end = trace.extra["end"]
        if tied:
            shared.append(end["tied_modules.embedding.weight"])
            end = {rename(name): value for name, value in end.items()}
        assert apart(end, expected) <= FP32
        assert trace.losses == pytest.approx(expected.losses, rel=FP32)
    assert all(np.array_equal(weight, shared[0]) for weight in shared)


def test_patterns_are_about_the_undivided_model(pools: Pools) -> None:
    """Each of them matches on one stage only; one that matches on none is refused on both."""
    settings = {**SHAMPOO, "roles": {"1.weight": "none", "5.weight": "none"}}
    expected = parallel_jobs.sequential(settings, 4, tied=False)
    traces = pools(2).run(parallel_jobs.pipeline, engine_config(settings, 1, 1, parallel_jobs.MICRO_BATCHES), 4, False)
    assert sum(t.metrics["owned_blocks"] for t in traces) == expected.metrics["owned_blocks"]
    assert expected.metrics["owned_blocks"] < in_one_process(False).metrics["owned_blocks"]
    settings["roles"] = {"5.weights": "none"}
    config = engine_config(settings, 1, 1, parallel_jobs.MICRO_BATCHES)
    for message in pools(2).run(refusal, config):
        assert "'roles' has the pattern '5.weights', which matches no parameter" in message


def refusal(config: dict[str, Any]) -> str:
    try:
        parallel_jobs.pipeline(config, 1, tied=False)
    except ValueError as error:
        return str(error)
    return ""


def rename(name: str) -> str:
    """A tied pipeline's name of a parameter in the single process's words."""
    return "layers.0.weight" if name.startswith("tied_modules") else f"layers.{name}"


@pytest.mark.parametrize("embedding", ["one_sided", "blocked"])
def test_a_tied_embedding_with_factors_of_its_own_on_each_stage_is_refused(pools: Pools, embedding: str) -> None:
    config = engine_config({**SHAMPOO, "embedding": embedding}, 1, 2, parallel_jobs.MICRO_BATCHES)
    for message in pools(4).run(refused_pipeline, config):
        assert f"'embedding' = '{embedding}'" in message


def test_a_tied_layer_of_two_classes_has_one_role_or_is_refused(pools: Pools) -> None:
    """A linear layer is a matrix, which its twin, an embedding, is not; the setting that the message has mends it."""
    config = engine_config({**SHAMPOO, **BY_ROLE}, 1, 2, parallel_jobs.MICRO_BATCHES)
    named = '"tied_modules.embedding.weight": "embedding"'
    for message in pools(4).run(refused_pipeline, config, parallel_jobs.SharedHead):
        assert "embedding.weight is taken for one thing on one stage" in message
        assert f"'roles' to {{{named}}}" in message
    roles = {"roles": {"tied_modules.embedding.weight": "embedding"}}
    config = engine_config({**SHAMPOO, **BY_ROLE, **roles}, 1, 2, parallel_jobs.MICRO_BATCHES)
    assert set(pools(4).run(refused_pipeline, config, parallel_jobs.SharedHead)) == {""}


def refused_pipeline(config: dict[str, Any], head: type[nn.Module] = parallel_jobs.SharedEmbedding) -> str:
    try:
        parallel_jobs.pipeline(config, 1, True, head=head)
    except ValueError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def experts_of_one_rank(pools: Pools) -> Trace:
    return pools(1).run(parallel_jobs.experts, engine_config(SHAMPOO, 0, 1), STEPS, 1)[0]


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("world_size", [2, 4])
def test_experts(pools: Pools, experts_of_one_rank: Trace, stage: int, world_size: int) -> None:
    expected = experts_of_one_rank
    traces = pools(world_size).run(parallel_jobs.experts, engine_config(SHAMPOO, stage, world_size), STEPS, 2)
    for trace in traces:
        assert apart(trace.extra["end"], expected) <= FP32
        assert trace.losses == pytest.approx(expected.losses, rel=FP32)
    counted = [sum(t.metrics["preconditioned_blocks"] for t in traces), expected.metrics["preconditioned_blocks"]]
    assert counted[0] == counted[1] > 0


@pytest.mark.parametrize("stage", [0, 2])
def test_settings_by_role_among_experts(pools: Pools, experts_of_one_rank: Trace, stage: int) -> None:
    settings = {**SHAMPOO, **BY_ROLE}
    (expected,) = pools(1).run(parallel_jobs.experts, engine_config(settings, 0, 1), STEPS, 1)
    for trace in pools(4).run(parallel_jobs.experts, engine_config(settings, stage, 4), STEPS, 2):
        assert apart(trace.extra["end"], expected) <= FP32
        assert apart(trace.extra["end"], experts_of_one_rank) > 0.1


@pytest.mark.parametrize("stage", [0, 1])
def test_a_pipeline_resumes_bit_for_bit(pools: Pools, tmp_path: Path, stage: int) -> None:
    config = engine_config(SHAMPOO, stage, 2, parallel_jobs.MICRO_BATCHES)
    straight = pools(4).run(parallel_jobs.pipeline, config, 14, True, str(tmp_path), 7)
    resumed = pools(4).run(parallel_jobs.pipeline, config, 14, True, str(tmp_path), 7, True)
    check_resumed(straight, resumed)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_experts_resume_bit_for_bit(pools: Pools, tmp_path: Path, stage: int) -> None:
    config = engine_config(SHAMPOO, stage, 2)
    straight = pools(2).run(parallel_jobs.experts, config, 14, 2, str(tmp_path), 7)
    resumed = pools(2).run(parallel_jobs.experts, config, 14, 2, str(tmp_path), 7, True)
    check_resumed(straight, resumed)


@pytest.mark.parametrize("stage", [0, 1])
def test_experts_at_another_expert_parallel_size_are_refused(pools: Pools, tmp_path: Path, stage: int) -> None:
    config = engine_config(SHAMPOO, stage, 2)
    pools(2).run(parallel_jobs.experts, config, 2, 2, str(tmp_path), 1)
    if stage == 1:
        with pytest.raises(CheckpointError, match="holds experts"):
            to_universal(tmp_path)
    for message in pools(2).run(refused_experts, config, str(tmp_path)):
        assert "experts lay over ['ep_size_2'] when this was saved, and lie over ['ep_size_1'] now" in message


def refused_experts(config: dict[str, Any], folder: str) -> str:
    try:
        parallel_jobs.experts(config, 2, 1, folder, 1, True)
    except RuntimeError as error:
        return str(error)
    return ""


def check_resumed(straight: list[Trace], resumed: list[Trace]) -> None:
    for before, after in zip(straight, resumed, strict=True):
        assert before.losses[7:] == after.losses
        assert np.array_equal(before.end, after.end)
