"""Hugging Face's Trainer, TRL's SFTTrainer and PEFT's LoRA, at two ranks, by DeepSpeed's JSON."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.pool import WorkerPool
from tests.trainers import hf_jobs
from tests.trainers.fresh import refusal
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
        assert (one.groups[0]["betas"], one.groups[0]["weight_decay"]) == ((0.9, 0.95), 0.02)


ONE_STEP = {"max_steps": 1, "eval_strategy": "no", "save_strategy": "no"}


def test_betas_by_auto_are_adams(pools: Pools, tmp_path: Path) -> None:
    """With a warning on the first rank."""
    config = deepspeed_json(2, betas="auto", eps="auto")
    first, other = pools(2).run(hf_jobs.by_trainer, "transformers", str(tmp_path), deepspeed=config, **ONE_STEP)
    assert [tuple(one.groups[0]["betas"]) for one in (first, other)] == [(0.9, 0.999)] * 2
    assert [message for message in first.warnings if message.startswith("betas = [0.9, 0.999] are Adam's")]
    assert not [message for message in other.warnings if "betas" in message]


def test_betas_by_auto_can_be_ours(pools: Pools, tmp_path: Path) -> None:
    config, betas = deepspeed_json(2, betas="auto"), {"adam_beta1": 0.95, "adam_beta2": 0.95}
    job = hf_jobs.by_trainer
    for one in pools(2).run(job, "transformers", str(tmp_path), deepspeed=config, **betas, **ONE_STEP):
        assert tuple(one.groups[0]["betas"]) == (0.95, 0.95)
        assert not [message for message in one.warnings if "betas" in message]


def test_what_trainer_refuses(pools: Pools, tmp_path: Path) -> None:
    """Betas in the JSON that Trainer's arguments do not repeat; and an "auto" that it does not know."""

    def message(**settings: object) -> str:
        config, folder = deepspeed_json(2, **settings), str(tmp_path)
        messages = pools(2).run(refusal, hf_jobs.by_trainer, "transformers", folder, deepspeed=config, **ONE_STEP)
        return str(messages[0])

    assert "ds optimizer.params.betas=[0.95, 0.95] vs hf adam_beta1+adam_beta2=[0.9, 0.999]" in message(
        betas=[0.95, 0.95]
    )
    assert message(block_size="auto").startswith("`optimizer.params.block_size` not found in kwargs. ")


@pytest.mark.parametrize("stage", [2, 3])
def test_the_factory_under_deepspeed(pools: Pools, tmp_path: Path, stage: int) -> None:
    """The JSON names no optimizer: Trainer makes one, with param groups of its own."""
    job, folder = hf_jobs.by_trainer, str(tmp_path)
    options = {"given": "factory", "deepspeed": deepspeed_json(stage, named=False)}
    whole = pools(2).run(job, "transformers", folder, **options)
    check(whole, pools(2).run(job, "transformers", folder, str(tmp_path / f"checkpoint-{SAVE_AT}"), **options))
    for one in whole:
        assert one.layout == {2: "FlatLayout", 3: "SubGroupLayout"}[stage]
        assert [group["weight_decay"] for group in one.groups] == [0.02, 0.0]


@pytest.mark.parametrize("given", ["factory", "object"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_without_deepspeed(pools: Pools, tmp_path: Path, ranks: int, given: str) -> None:
    """In one process, and under DDP, which Trainer puts around the model when the optimizer is there already."""
    job, folder = hf_jobs.by_trainer, str(tmp_path)
    whole = pools(ranks).run(job, "transformers", folder, given=given)
    checkpoint = str(tmp_path / f"checkpoint-{SAVE_AT}")
    check(whole, pools(ranks).run(job, "transformers", folder, checkpoint, given=given))
    assert any("which share no work then" in message for message in whole[0].warnings) == (ranks > 1)
    for one in whole:
        assert one.optimizer == {"factory": "TrainerShampoo", "object": "Shampoo"}[given]
        assert [group["weight_decay"] for group in one.groups] == {"factory": [0.02, 0.0], "object": [0.02]}[given]


def test_an_object_beside_deepspeed_trains_nothing(pools: Pools, tmp_path: Path) -> None:
    """Trainer drops it for AdamW, and one hears of it."""
    options = {"given": "object", "deepspeed": deepspeed_json(2, named=False), **ONE_STEP}
    first, other = pools(2).run(hf_jobs.by_trainer, "transformers", str(tmp_path), **options)
    assert (first.optimizer, other.optimizer) == ("AdamW", "AdamW")
    assert [message for message in first.warnings if "trains with AdamW: the object trains nothing" in message]
