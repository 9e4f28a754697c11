"""What the ranks run of Accelerate: a training loop of the user's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from accelerate.utils import DummyOptim, set_seed
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from tests.distributed.jobs import flat
from tests.trainers.fresh import fresh, listening
from tests.trainers.models import llama, windows
from tests.trainers.outcome import ACCUMULATION, SAVE_AT, STEPS, Outcome


def by_accelerate(config: dict[str, Any], folder: str, resume: bool = False) -> Outcome:
    """Trains from the beginning and saves half-way, or goes on from there."""
    with fresh(), listening() as heard:
        set_seed(0)
        PartialState(cpu=True)
        plugin = DeepSpeedPlugin(hf_ds_config=config, gradient_accumulation_steps=ACCUMULATION, gradient_clipping=1.0)
        accelerator = Accelerator(deepspeed_plugin=plugin)
        model, found = llama(), Outcome()
        optimizer: Any = DummyOptim(model.parameters(), lr=4e-3, weight_decay=0.02)
        train, validation = windows()
        model, optimizer, batches, held_out = accelerator.prepare(
            model, optimizer, DataLoader(train, batch_size=2, shuffle=True), DataLoader(validation, batch_size=2)
        )
        schedule = LambdaLR(optimizer, lambda step: 1 / (1 + step))
        accelerator.register_for_checkpointing(schedule)
        if resume:
            accelerator.load_state(folder)
            batches = accelerator.skip_first_batches(batches, ACCUMULATION * schedule.last_epoch)
        for loss in _steps(accelerator, model, optimizer, batches):
            found.losses.append(loss)
            if accelerator.sync_gradients:
                schedule.step()
                found.weights[schedule.last_epoch] = flat(model)
                if schedule.last_epoch == SAVE_AT:
                    found.held_out.append(_evaluation(accelerator, model, held_out))
                    accelerator.save_state(folder)
                if schedule.last_epoch == STEPS:
                    break
        found.note(model.basic_optimizer, heard)
        return found


def _steps(accelerator: Accelerator, model: Any, optimizer: Any, batches: Any) -> Iterator[float]:
    for batch in batches:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        yield loss.item()


@torch.no_grad()
def _evaluation(accelerator: Accelerator, model: Any, batches: Any) -> float:
    model.eval()
    losses = [accelerator.gather(model(**batch).loss).mean().item() for batch in batches]
    model.train()
    return sum(losses) / len(losses)
