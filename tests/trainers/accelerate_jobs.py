"""What the ranks run of Accelerate: a training loop of the user's own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from accelerate.utils import DataLoaderConfiguration, DummyOptim, set_seed
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from ds_shampoo import Shampoo
from tests.distributed.jobs import flat
from tests.trainers.fresh import fresh, listening
from tests.trainers.models import SHAMPOO, llama, windows
from tests.trainers.outcome import ACCUMULATION, SAVE_AT, STEPS, Outcome


def by_accelerate(config: dict[str, Any] | None, folder: str, resume: bool = False) -> Outcome:
    """Trains from the beginning and saves half-way, or goes on from there.

    Args:
        config: DeepSpeed's; where it names no optimizer, `prepare` is given a Shampoo. Without a config there is no
            DeepSpeed, and the model is wrapped first.
    """
    with fresh(), listening() as heard:
        set_seed(0)
        if dist.get_world_size() == 1:  # as where no launcher started it
            del os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]
        PartialState(cpu=True)
        accelerator = _accelerator(config)
        found = Outcome()
        model, optimizer, batches, held_out = _prepared(accelerator, config, *windows())
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
        found.note(optimizer.optimizer if config is None else model.basic_optimizer, heard)
        return found


def _accelerator(config: dict[str, Any] | None) -> Accelerator:
    order = DataLoaderConfiguration(use_seedable_sampler=True)  # else one process shuffles anew when it goes on
    if config is None:
        return Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION, dataloader_config=order)
    plugin = DeepSpeedPlugin(hf_ds_config=config, gradient_accumulation_steps=ACCUMULATION, gradient_clipping=1.0)
    return Accelerator(deepspeed_plugin=plugin, dataloader_config=order)


def _prepared(accelerator: Accelerator, config: dict[str, Any] | None, *texts: Dataset[Any]) -> Any:
    """The model, its optimizer and the batches of both texts, as Accelerate wraps them."""
    train, validation = texts
    loaders = DataLoader(train, batch_size=2, shuffle=True), DataLoader(validation, batch_size=2)
    model: Any = llama()
    optimizer: Any
    if config is None:
        model = accelerator.prepare(model)  # first: ranks share the work where Shampoo knows the wrapped model
        shampoo = Shampoo(model.parameters(), model=model, lr=4e-3, weight_decay=0.02, **SHAMPOO)
        optimizer = accelerator.prepare_optimizer(shampoo, device_placement=False)  # it is where the model is
        accelerator.register_save_state_pre_hook(lambda *_: shampoo.consolidate_state_dict())
        return model, optimizer, *accelerator.prepare(*loaders)
    if "optimizer" in config:
        optimizer = DummyOptim(model.parameters(), lr=4e-3, weight_decay=0.02)
    else:
        optimizer = Shampoo(model.parameters(), lr=4e-3, weight_decay=0.02, **SHAMPOO)
    return accelerator.prepare(model, optimizer, *loaders)


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
