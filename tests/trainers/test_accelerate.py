"""Accelerate's own loop, at two ranks, by DeepSpeed's JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.pool import WorkerPool
from tests.trainers import accelerate_jobs
from tests.trainers.fresh import refusal
from tests.trainers.models import deepspeed_json
from tests.trainers.outcome import check

Pools = Callable[[int], WorkerPool]


@pytest.mark.parametrize("stage", [2, 3])
def test_it_trains_and_resumes(pools: Pools, tmp_path: Path, stage: int) -> None:
    config, folder = deepspeed_json(stage), str(tmp_path)
    whole = pools(2).run(accelerate_jobs.by_accelerate, config, folder)
    check(whole, pools(2).run(accelerate_jobs.by_accelerate, config, folder, resume=True))
    for one in whole:
        assert one.layout == {2: "FlatLayout", 3: "SubGroupLayout"}[stage]
        assert one.groups[0]["lr"] == pytest.approx(4e-3 / 9)
        assert one.groups[0]["weight_decay"] == 0.02


@pytest.mark.parametrize("stage", [2, 3])
def test_an_object_under_deepspeed(pools: Pools, tmp_path: Path, stage: int) -> None:
    config, folder = deepspeed_json(stage, named=False), str(tmp_path)
    whole = pools(2).run(accelerate_jobs.by_accelerate, config, folder)
    check(whole, pools(2).run(accelerate_jobs.by_accelerate, config, folder, resume=True))
    assert all(one.layout == {2: "FlatLayout", 3: "SubGroupLayout"}[stage] for one in whole)


@pytest.mark.parametrize("ranks", [1, 2])
def test_without_deepspeed(pools: Pools, tmp_path: Path, ranks: int) -> None:
    """In one process, and under DDP, whose ranks share the blocks out where the model is prepared first."""
    folder = str(tmp_path)
    whole = pools(ranks).run(accelerate_jobs.by_accelerate, None, folder)
    check(whole, pools(ranks).run(accelerate_jobs.by_accelerate, None, folder, resume=True))
    assert all(one.layout == {1: "WholeLayout", 2: "DataParallelLayout"}[ranks] for one in whole)


def test_an_auto_that_accelerate_does_not_fill_in(pools: Pools, tmp_path: Path) -> None:
    config = deepspeed_json(2, betas="auto")
    for message in pools(2).run(refusal, accelerate_jobs.by_accelerate, config, str(tmp_path)):
        assert message.startswith("`optimizer.params.betas` not found in kwargs. ")  # Accelerate's own
