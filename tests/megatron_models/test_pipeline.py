"""A Megatron GPT through DeepSpeed's pipeline engine: one trajectory at any number of stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ds_shampoo.frameworks.deepspeed.universal import to_universal
from tests.distributed.jobs import engine_config
from tests.distributed.pool import WorkerPool
from tests.distributed.test_parity import BY_ROLE, FP32

pytest.importorskip("megatron.core")
from tests.megatron_models import pipeline_jobs
from tests.megatron_models.jobs import SETTINGS, Run
from tests.megatron_models.pipeline_jobs import MICRO_BATCHES

Pools = Callable[[int], WorkerPool]
STEPS = 20
CLIP = 0.5  # as it does from the first step on

# Biases of keys have no gradient but rounding, which Adam would blow up to whole steps.
EPS = {"eps": 1e-6}
_references: dict[str, Run] = {}


def config_of(ranks: int, stage: int, precision: str = "fp32", **settings: Any) -> dict[str, Any]:
    """For this many data-parallel ranks."""
    config = engine_config({**SETTINGS, **EPS, **settings}, stage, ranks, MICRO_BATCHES, precision=precision)
    return {**config, "gradient_clipping": CLIP}


def reference(pools: Pools, own: dict[str, Any] | None = None, **shape: Any) -> Run:
    """`own` are settings that differ."""
    key = f"{own}{shape}"
    if key not in _references:
        config = {**engine_config({**SETTINGS, **EPS, **(own or {})}, 0, 1), "gradient_clipping": CLIP}
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


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_settings_by_role(pools: Pools, tied: bool) -> None:
    own = {**BY_ROLE, "vector_eps": 1e-6}
    runs = pools(4).run(pipeline_jobs.pipeline, config_of(1, 1, **own), STEPS, 2, tied=tied)
    check(runs, reference(pools, own, tied=tied))


def test_rotary_positions_recomputed_activations_and_evaluation(pools: Pools) -> None:
    config = {**config_of(1, 1), "pipeline": {"activation_checkpoint_interval": 1}}
    runs = pools(2).run(pipeline_jobs.pipeline, config, STEPS, positions="rope", gated=True, evaluate=True)
    evaluated = [r.losses.pop() for r in runs]
    check(runs, reference(pools, positions="rope", gated=True))
    assert evaluated[0] == evaluated[1] < runs[0].losses[0]


@pytest.mark.parametrize(("tensor_parallel", "stage", "tied"), [(1, 1, True), (2, 0, False)], ids=["dp", "tp"])
def test_it_resumes_bit_for_bit(pools: Pools, tmp_path: Path, tensor_parallel: int, stage: int, tied: bool) -> None:
    """Saved with jobs under way; in the universal form, one process takes it up as one stage."""
    saved = {"folder": str(tmp_path), "save_at": 7, "tied": tied}
    arguments = (config_of(2 // tensor_parallel, stage), 14, tensor_parallel)
    straight = pools(4).run(pipeline_jobs.pipeline, *arguments, **saved)
    resumed = pools(4).run(pipeline_jobs.pipeline, *arguments, **saved, resume=True)
    for before, after in zip(straight, resumed, strict=True):
        assert before.losses[7:] == after.losses
        assert all(np.array_equal(before.end[name], value) for name, value in after.end.items())
    if stage == 1:
        assert replicated(tmp_path / f"global_step{saved['save_at']}") == [r"tied_modules\.embedding\."]
        to_universal(tmp_path)
        config = {**config_of(1, stage), "checkpoint": {"load_universal": True}}
        (alone,) = pools(1).run(pipeline_jobs.pipeline, config, 14, 1, 1, **saved, resume=True)
        assert alone.losses == pytest.approx(straight[0].losses[7:], rel=FP32)
        assert set(alone.preconditioned) == {name for r in straight for name in r.preconditioned}


def replicated(folder: Path) -> list[str]:
    """What a checkpoint says of parameters that several stages hold: their pieces are not to be joined."""
    state = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
    patterns: list[str] = state["universal_checkpoint_info"]["pipeline_replicated_parameter_patterns"]
    return patterns


def test_another_number_of_stages_is_refused(pools: Pools, tmp_path: Path) -> None:
    pools(2).run(pipeline_jobs.pipeline, config_of(1, 0), 2, folder=str(tmp_path), save_at=1)
    for found in pools(2).run(pipeline_jobs.refusal, config_of(2, 0), folder=str(tmp_path), pipeline_parallel=1):
        assert "saved over 2 pipeline stages, to be loaded over 1" in found


def test_bf16_trains(pools: Pools) -> None:
    runs = pools(4).run(pipeline_jobs.pipeline, config_of(1, 1, "bf16"), 8, 2, tied=True)
    assert runs[0].losses[-1] < runs[0].losses[0]
    assert sum(r.metrics["roots_rejected"] for r in runs) == 0


SEQUENCE = {"tensor_parallel": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("ranks", "config", "shape", "message"),
    [
        (2, config_of(1, 2), {}, "zero_optimization.stage = 2 or 3 with pipeline parallelism"),
        (2, config_of(1, 1), {"num_layers": 3}, "num_layers = 3: must be divisible by the 2 pipeline stages"),
        (2, config_of(1, 1), {"positions": "yarn"}, "position_embedding_type = 'yarn': must be one of"),
        (2, config_of(1, 1), {"experts": 4}, "num_moe_experts: experts are not supported"),
        (2, config_of(1, 1, embedding="blocked"), {"tied": True}, "'embedding' = 'blocked': a pipeline with tied"),
        (4, config_of(2, 1), {"order": "tp-cp-ep-pp-dp"}, "rank 0 is in Megatron's pipe-parallel group [0, 1], and"),
        (4, config_of(1, 1), {"direct": True, **SEQUENCE}, "pipeline.pipe_partitioned or grad_partitioned = true"),
        (4, {**config_of(1, 1), "pipeline": {"pipe_partitioned": True}}, SEQUENCE, "pipeline.pipe_partitioned = true"),
    ],
    ids=["stage", "layers", "positions", "experts", "tied", "order", "partitioned", "partitioned-by-the-user"],
)
def test_refusals(pools: Pools, ranks: int, config: dict[str, Any], shape: dict[str, Any], message: str) -> None:
    for found in pools(ranks).run(pipeline_jobs.refusal, config, **shape):
        assert message in found
