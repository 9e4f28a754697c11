"""Lightning, at two ranks, by DeepSpeed's JSON or with a Shampoo of the module's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.pool import WorkerPool
from tests.trainers import lightning_jobs
from tests.trainers.fresh import refusal
from tests.trainers.models import SHAMPOO
from tests.trainers.outcome import check

Pools = Callable[[int], WorkerPool]


CONFIG = {"zero_allow_untested_optimizer": True}
NAMED = {"optimizer": {"type": "Shampoo", "params": {"lr": 4e-3, "weight_decay": 0.02, **SHAMPOO}}}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("named", [NAMED, {}], ids=["by the JSON", "by the module"])
def test_under_deepspeed(pools: Pools, tmp_path: Path, named: dict[str, Any], stage: int) -> None:
    config = {**CONFIG, **named, "zero_optimization": {"stage": stage}}
    folder = str(tmp_path)
    whole = pools(2).run(lightning_jobs.by_lightning, config, folder)
    check(whole, pools(2).run(lightning_jobs.by_lightning, config, folder, resume=True))
    assert all(one.layout == {2: "FlatLayout", 3: "SubGroupLayout"}[stage] for one in whole)


def test_an_auto_that_nobody_fills_in(pools: Pools, tmp_path: Path) -> None:
    config = {**CONFIG, "optimizer": {"type": "Shampoo", "params": {"lr": "auto"}}, "zero_optimization": {"stage": 2}}
    for message in pools(2).run(refusal, lightning_jobs.by_lightning, config, str(tmp_path)):
        assert message.startswith("Shampoo setting 'lr' = \"auto\": nobody has filled it in. ")


@pytest.mark.parametrize("ranks", [1, 2])
def test_without_deepspeed(pools: Pools, tmp_path: Path, ranks: int) -> None:
    """In one process, and under DDP, whose ranks share the blocks out."""
    folder = str(tmp_path)
    whole = pools(ranks).run(lightning_jobs.by_lightning, None, folder)
    check(whole, pools(ranks).run(lightning_jobs.by_lightning, None, folder, resume=True))
    assert all(one.layout == {1: "WholeLayout", 2: "DataParallelLayout"}[ranks] for one in whole)
