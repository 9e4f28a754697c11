"""Jobs that change as they go, under the real engine: schedules come back, and who is frozen loses nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ds_shampoo.frameworks.deepspeed.universal import to_universal
from tests.distributed import phase_jobs
from tests.distributed.jobs import SHAMPOO, engine_config
from tests.distributed.pool import WorkerPool
from tests.distributed.test_parity import FP32

Pools = Callable[[int], WorkerPool]


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "fp32")])
def test_what_a_schedule_has_changed_comes_back(pools: Pools, tmp_path: Path, stage: int, precision: str) -> None:
    """In a new job, and on rolling back, until the schedule's next step: the run goes on to the same bits."""
    config = engine_config(SHAMPOO, stage, 2, precision=precision)
    for straight, resumed, back in pools(2).run(phase_jobs.schedule_resumed, config, str(tmp_path), 6, 10):
        assert np.array_equal(straight, resumed)
        assert np.array_equal(straight, back)


def test_what_was_not_changed_is_the_new_jobs(pools: Pools, tmp_path: Path) -> None:
    """A schedule has the betas; `grafting` is what the new JSON says."""
    config = engine_config(SHAMPOO, 2, 2)
    other = engine_config({**SHAMPOO, "grafting": "rmsprop"}, 2, 2)
    for straight, resumed, _ in pools(2).run(phase_jobs.schedule_resumed, config, str(tmp_path), 6, 10, other):
        assert not np.array_equal(straight, resumed)


@pytest.mark.parametrize(("saved_at", "stage"), [(2, 3), (3, 1)])
def test_through_the_universal_form(pools: Pools, tmp_path: Path, saved_at: int, stage: int) -> None:
    straight = pools(2).run(phase_jobs.schedule_saved, engine_config(SHAMPOO, saved_at, 2), str(tmp_path), 6, 10)[0]
    to_universal(tmp_path)
    config = engine_config(SHAMPOO, stage, 4, checkpoint={"load_universal": True})
    for end in pools(4).run(phase_jobs.schedule_loaded, config, str(tmp_path), 6, 10):
        assert np.linalg.norm(end - straight) <= FP32 * np.linalg.norm(straight)


# Layers that take turns (LISA, a generator and its critic), and gradual unfreezing after a common start.
PHASES = [[set(), {0}, {1}], [set(), {0, 1}, set()]]


@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "a group a layer"])
@pytest.mark.parametrize("phases", PHASES, ids=str)
@pytest.mark.parametrize("world_size", [1, 2])
def test_stage_0_is_as_one_process(pools: Pools, phases: list[set[int]], grouped: bool, world_size: int) -> None:
    expected = phase_jobs.phases_alone(SHAMPOO, phases, 5)
    config = engine_config(SHAMPOO, 0, world_size)
    for end, metrics, seen in pools(world_size).run(phase_jobs.phases, config, phases, 5, grouped):
        assert seen
        assert metrics["roots_rejected"] == 0
        assert np.linalg.norm(end - expected) <= FP32 * np.linalg.norm(expected)


@pytest.mark.parametrize("grouped", [False, True], ids=["one group", "a group a layer"])
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "fp32"), (2, "bf16"), (3, "fp32")])
def test_saved_while_frozen_and_loaded_while_trained(
    pools: Pools, tmp_path: Path, stage: int, precision: str, grouped: bool
) -> None:
    """And the other way round; nothing of a frozen layer is lost, and every step is known to be over.

    From stage 2 on DeepSpeed itself loads into a model only what was frozen as it was at the save.
    """
    phases: list[set[int]] = [set(), {0}, {1}]
    config = engine_config(SHAMPOO, stage, 2, precision=precision)
    straight = pools(2).run(phase_jobs.phases, config, phases, 5, grouped, str(tmp_path), 8)
    for first in (0, 1, 2) if stage < 2 else (1,):
        resumed = pools(2).run(phase_jobs.phases_resumed, config, phases, 5, grouped, str(tmp_path), 8, first)
        for (end, _, seen), again in zip(straight, resumed, strict=True):
            assert seen
            assert np.array_equal(end, again)


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_layer_that_thaws_at_stage_0_is_preconditioned(pools: Pools, tmp_path: Path, world_size: int) -> None:
    config = engine_config(SHAMPOO, 0, world_size)
    for before, after in pools(world_size).run(phase_jobs.frozen_from_the_start, config, str(tmp_path)):
        assert 0 < before < after
