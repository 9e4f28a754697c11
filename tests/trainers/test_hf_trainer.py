"""Hugging Face's Trainer, TRL's SFTTrainer and PEFT's LoRA, at two ranks, by DeepSpeed's JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.pool import WorkerPool
from tests.trainers import hf_jobs
from tests.trainers.models import deepspeed_json
from tests.trainers.outcome import SAVE_AT, check

Pools = Callable[[int], WorkerPool]


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("library", ["transformers", "trl", "peft"])
def test_it_trains_and_resumes(pools: Pools, tmp_path: Path, library: str, stage: int) -> None:
    """The best model comes back at the end: here that of the highest loss, the earlier of the two that are saved."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    config, folder = deepspeed_json(stage), str(tmp_path)
    whole = pools(2).run(hf_jobs.by_trainer, library, folder, deepspeed=config, **best)
    checkpoint = str(tmp_path / f"checkpoint-{SAVE_AT}")
    resumed = pools(2).run(hf_jobs.by_trainer, library, folder, checkpoint, deepspeed=config)
    check(whole, resumed)
    for one in whole:
        assert one.held_out[1] < one.held_out[0]
        assert np.array_equal(one.end, one.weights[SAVE_AT])
        assert one.layout == {2: "FlatLayout", 3: "SubGroupLayout"}[stage]
        assert (one.groups[0]["betas"], one.groups[0]["weight_decay"]) == ((0.95, 0.95), 0.02)
