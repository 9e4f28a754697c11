"""Accelerate's own training loop with Shampoo, which DeepSpeed's JSON names.

torchrun --nproc-per-node 2 examples/accelerate_loop.py --deepspeed examples/zero2.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from accelerate.utils import DataLoaderConfiguration, DummyOptim, set_seed
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import ds_shampoo  # noqa: F401  DeepSpeed knows "type": "Shampoo" from here on
from text import VOCABULARY, train_and_validation

CONTEXT = 64


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed", default=str(Path(__file__).with_name("zero2.json")), help="DeepSpeed's JSON")
    parser.add_argument("--text", type=Path, help="a text file; Python's language reference without it")
    parser.add_argument("--output", type=Path, default=Path("runs/accelerate_loop"), help="a folder for checkpoints")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder")
    parser.add_argument("--local_rank", type=int, help="set by DeepSpeed's launcher")
    return parser.parse_args()


def main() -> None:
    flags = parse()
    set_seed(0)
    if not torch.cuda.is_available():
        PartialState(cpu=True)  # else Accelerate takes every rank for the only one
    plugin = DeepSpeedPlugin(hf_ds_config=flags.deepspeed, gradient_accumulation_steps=2, gradient_clipping=1.0)
    order = DataLoaderConfiguration(use_seedable_sampler=True)  # the same when the run goes on
    accelerator = Accelerator(deepspeed_plugin=plugin, dataloader_config=order)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        )
    )
    train, validation = train_and_validation(flags.text, CONTEXT)
    # The JSON's optimizer takes the parameters from here, and lr and weight_decay where they are "auto".
    optimizer = DummyOptim(model.parameters(), lr=4e-3, weight_decay=0.01)
    model, optimizer, batches, held_out = accelerator.prepare(
        model, optimizer, DataLoader(train, batch_size=8, shuffle=True), DataLoader(validation, batch_size=8)
    )
    schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20))
    accelerator.register_for_checkpointing(schedule)
    done = 0
    if flags.resume:
        accelerator.load_state(str(flags.output))
        done = schedule.last_epoch
        batches = accelerator.skip_first_batches(batches, 2 * done)
    while done < flags.steps:
        for batch in batches:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                schedule.step()
                done += 1
            if done == flags.steps:
                break
    accelerator.save_state(str(flags.output))
    model.eval()
    with torch.no_grad():
        losses = [accelerator.gather(model(**batch).loss).mean() for batch in held_out]
    blocks = model.basic_optimizer.metrics()["preconditioned_blocks"]
    accelerator.print(
        f"validation loss {torch.stack(losses).mean():.3f}; the first rank preconditions {blocks:.0f} blocks"
    )


if __name__ == "__main__":
    main()
