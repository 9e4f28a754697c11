"""What the ranks run of Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from tests.distributed.jobs import flat
from tests.trainers.fresh import fresh, from_example, listening
from tests.trainers.models import gpt2, windows
from tests.trainers.outcome import ACCUMULATION, SAVE_AT, STEPS, Outcome


class Small(lightning.LightningModule):
    """A tiny GPT-2, optimized by what DeepSpeed's JSON names."""

    def __init__(self, found: Outcome) -> None:
        super().__init__()
        self.gpt, self.found = gpt2(), found

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss: Tensor = self.gpt(**batch).loss
        self.found.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        self.found.held_out.append(self.gpt(**batch).loss.item())

    def configure_optimizers(self) -> Any:
        return None


class Watch(Callback):
    """Keeps the weights after every step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        pl_module.found.weights[trainer.global_step] = flat(pl_module.gpt)


def by_lightning(config: dict[str, Any], folder: str, resume: bool = False) -> Outcome:
    """Trains from the beginning and saves half-way, or goes on from there."""
    with fresh(), listening() as heard:
        lightning.seed_everything(0, verbose=False)
        found = Outcome()
        trainer = lightning.Trainer(
            strategy=from_example("lightning_fit", "OnCPU")(config=config),
            devices=2,
            max_steps=STEPS,
            accumulate_grad_batches=ACCUMULATION,
            gradient_clip_val=1.0,
            val_check_interval=ACCUMULATION * SAVE_AT,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            callbacks=[Watch(), ModelCheckpoint(folder, "{step}", every_n_train_steps=SAVE_AT, save_top_k=-1)],
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        train, validation = windows()
        epoch = Subset(train, range(2 * 2 * ACCUMULATION * SAVE_AT))  # Lightning goes on where an epoch begins
        trainer.fit(
            Small(found),
            DataLoader(epoch, batch_size=2),
            DataLoader(validation, batch_size=2),
            ckpt_path=str(Path(folder) / f"step={SAVE_AT}.ckpt") if resume else None,
        )
        found.note(trainer.strategy.deepspeed_engine.basic_optimizer, heard)
        return found
