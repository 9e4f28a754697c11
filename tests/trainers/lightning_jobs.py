"""What the ranks run of Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from ds_shampoo import Shampoo
from tests.distributed.jobs import flat
from tests.trainers.fresh import fresh, from_example, listening
from tests.trainers.models import SHAMPOO, gpt2, windows
from tests.trainers.outcome import ACCUMULATION, SAVE_AT, STEPS, Outcome


class Small(lightning.LightningModule):
    """A tiny GPT-2, optimized by what DeepSpeed's JSON names, or by a Shampoo of its own."""

    def __init__(self, found: Outcome, by_json: bool) -> None:
        super().__init__()
        self.gpt = gpt2(dropout=0.0)  # Lightning's checkpoints have no state of random numbers
        self.found, self.by_json = found, by_json

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss: Tensor = self.gpt(**batch).loss
        self.found.losses.append(loss.item())
        return loss

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        self.found.held_out.append(self.gpt(**batch).loss.item())

    def configure_optimizers(self) -> Any:
        if self.by_json:
            return None
        wrapped = self.trainer.strategy.model  # under DDP, the DistributedDataParallel: ranks share the work then
        return Shampoo(self.parameters(), model=wrapped, lr=4e-3, weight_decay=0.02, **SHAMPOO)


class Watch(Callback):
    """Keeps the weights after every step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % ACCUMULATION == 0:
            pl_module.found.weights[trainer.global_step] = flat(pl_module.gpt)


def by_lightning(config: dict[str, Any] | None, folder: str, resume: bool = False) -> Outcome:
    """Trains from the beginning and saves half-way, or goes on from there.

    Args:
        config: DeepSpeed's; where it names no optimizer the module makes a Shampoo. Without a config there is no
            DeepSpeed, but DDP, or a single process.
    """
    ranks = dist.get_world_size()
    with fresh(), listening() as heard:
        lightning.seed_everything(0, verbose=False)
        found = Outcome()
        trainer = lightning.Trainer(
            accelerator="cpu",
            strategy=_strategy(config, ranks),
            devices=ranks,
            max_steps=STEPS,
            accumulate_grad_batches=ACCUMULATION,
            gradient_clip_val=1.0,
            val_check_interval=ACCUMULATION * SAVE_AT,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            callbacks=[Watch(), ModelCheckpoint(folder, "{step}", save_top_k=-1)],
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        train, validation = windows()
        epoch = Subset(train, range(2 * ranks * ACCUMULATION * SAVE_AT))  # Lightning goes on where an epoch begins
        trainer.fit(
            Small(found, by_json="optimizer" in (config or {})),
            DataLoader(epoch, batch_size=2),
            DataLoader(validation, batch_size=2),
            ckpt_path=str(Path(folder) / f"step={SAVE_AT}.ckpt") if resume else None,
        )
        made = trainer.optimizers[0] if config is None else trainer.strategy.deepspeed_engine.basic_optimizer
        found.note(made, heard)
        return found


def _strategy(config: dict[str, Any] | None, ranks: int) -> Any:
    if config is not None:
        return from_example("lightning_fit", "OnCPU")(config=config)
    return DDPStrategy(process_group_backend="gloo") if ranks > 1 else "auto"
