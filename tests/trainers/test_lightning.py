"""Lightning, at two ranks, by DeepSpeed's JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.pool import WorkerPool
from tests.trainers import lightning_jobs
from tests.trainers.models import SHAMPOO
from tests.trainers.outcome import check

Pools = Callable[[int], WorkerPool]


@pytest.mark.parametrize("stage", [2, 3])
def test_it_trains_and_resumes(pools: Pools, tmp_path: Path, stage: int) -> None:
    config = {
        "optimizer": {"type": "Shampoo", "params": {"lr": 4e-3, "weight_decay": 0.02, **SHAMPOO}},
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    folder = str(tmp_path)
    whole = pools(2).run(lightning_jobs.by_lightning, config, folder)
    check(whole, pools(2).run(lightning_jobs.by_lightning, config, folder, resume=True))
    assert all(one.layout == {2: "FlatLayout", 3: "SubGroupLayout"}[stage] for one in whole)
