"""Hugging Face's Trainer, TRL's SFTTrainer and PEFT's LoRA, at two ranks, by DeepSpeed's JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.pool import WorkerPool
from tests.trainers import hf_jobs
from tests.trainers.models import deepspeed_json

Pools = Callable[[int], WorkerPool]

LIBRARIES = ["transformers", "trl", "peft"]


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("library", LIBRARIES)
def test_it_trains_and_resumes(pools: Pools, tmp_path: Path, library: str, stage: int) -> None:
    """The best model comes back at the end; a run that goes on from a checkpoint ends bit for bit where it would have.

    The best is here the one with the highest loss, so that it is the earlier of the two that are saved.
    """
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    config, folder = deepspeed_json(stage), str(tmp_path)
    whole = pools(2).run(hf_jobs.by_trainer, library, folder, deepspeed=config, **best)
    checkpoint = str(tmp_path / f"checkpoint-{hf_jobs.SAVE_AT}")
    resumed = pools(2).run(hf_jobs.by_trainer, library, folder, checkpoint, deepspeed=config)
    for rank, (one, other) in enumerate(zip(whole, resumed, strict=True)):
        assert one.held_out[1] < one.held_out[0]
        assert np.array_equal(one.end, one.weights[hf_jobs.SAVE_AT])
        assert sorted(other.weights) == [5, 6, 7, 8]
        assert all(np.array_equal(other.weights[step], one.weights[step]) for step in other.weights)
        assert other.losses == one.losses
        assert other.metrics["preconditioned_blocks"] == other.metrics["owned_blocks"] > 0
        assert other.metrics["root_updates"] > 0
        assert np.array_equal(one.weights[8], whole[0].weights[8])
        assert (one.groups[0]["betas"], one.groups[0]["weight_decay"]) == ((0.95, 0.95), 0.02)
        assert not one.warnings or rank == 0
