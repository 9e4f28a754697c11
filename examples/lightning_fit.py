"""Lightning with Shampoo, which DeepSpeed's JSON names.

torchrun --nproc-per-node 2 examples/lightning_fit.py --deepspeed examples/zero2_lightning.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

import ds_shampoo  # noqa: F401  DeepSpeed knows "type": "Shampoo" from here on
from text import VOCABULARY, train_and_validation

CONTEXT = 64


class LanguageModel(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.gpt = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=CONTEXT,
                n_embd=64,
                n_layer=2,
                n_head=4,
                bos_token_id=0,
                eos_token_id=0,
            )
        )

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        loss: Tensor = self.gpt(**batch).loss
        return loss

    def validation_step(self, batch: dict[str, Tensor], _: int) -> None:
        self.log("validation_loss", self.gpt(**batch).loss, sync_dist=True)

    def configure_optimizers(self) -> None:
        """Nothing: DeepSpeed makes the optimizer that its JSON names."""


class OnCPU(DeepSpeedStrategy):
    """DeepSpeedStrategy where there is no GPU, which Lightning asks for; leave this out where there is one."""

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", 0)

    def setup_environment(self) -> None:
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed", default=str(Path(__file__).with_name("zero2_lightning.json")))
    parser.add_argument("--text", type=Path, help="a text file; Python's language reference without it")
    parser.add_argument("--output", type=Path, default=Path("runs/lightning_fit"), help="a folder for checkpoints")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder")
    parser.add_argument("--devices", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    flags = parse()
    lightning.seed_everything(0)
    train, validation = train_and_validation(flags.text, CONTEXT)
    strategy = DeepSpeedStrategy if torch.cuda.is_available() else OnCPU
    trainer = lightning.Trainer(
        strategy=strategy(config=flags.deepspeed),
        devices=flags.devices,
        max_steps=flags.steps,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        val_check_interval=2 * max(1, flags.steps // 4),  # batches; checkpoints are saved then
        check_val_every_n_epoch=None,
        limit_val_batches=8,
        callbacks=[ModelCheckpoint(flags.output, save_last=True)],
        default_root_dir=flags.output,
        logger=False,
    )
    model = LanguageModel()
    trainer.fit(
        model,
        DataLoader(train, batch_size=8, shuffle=True),
        DataLoader(validation, batch_size=8),
        ckpt_path=flags.output / "last.ckpt" if flags.resume else None,
    )
    blocks = trainer.strategy.deepspeed_engine.basic_optimizer.metrics()["preconditioned_blocks"]
    if trainer.is_global_zero:
        loss = trainer.callback_metrics["validation_loss"]
        print(f"validation loss {loss:.3f}; the first rank preconditions {blocks:.0f} blocks")


if __name__ == "__main__":
    main()
