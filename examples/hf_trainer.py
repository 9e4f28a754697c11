"""Hugging Face's Trainer with Shampoo, which DeepSpeed's JSON names.

deepspeed --num_gpus 2 examples/hf_trainer.py --deepspeed examples/zero2.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import ds_shampoo  # noqa: F401  DeepSpeed knows "type": "Shampoo" from here on
from text import VOCABULARY, train_and_validation

CONTEXT = 64


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed", default=str(Path(__file__).with_name("zero2.json")), help="DeepSpeed's JSON")
    parser.add_argument("--text", type=Path, help="a text file; Python's language reference without it")
    parser.add_argument("--output", default="runs/hf_trainer", help="a folder for checkpoints")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the folder")
    parser.add_argument("--local_rank", type=int, help="set by DeepSpeed's launcher")
    return parser.parse_args()


def main() -> None:
    flags = parse()
    train, validation = train_and_validation(flags.text, CONTEXT)
    arguments = TrainingArguments(
        output_dir=flags.output,
        deepspeed=flags.deepspeed,
        learning_rate=4e-3,  # "auto" in the JSON takes this one; Trainer's own default is 5e-5
        weight_decay=0.01,  # and this one
        max_steps=flags.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        lr_scheduler_type="cosine",
        warmup_steps=flags.steps // 10,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=max(1, flags.steps // 4),
        save_steps=max(1, flags.steps // 4),
        load_best_model_at_end=True,
        logging_steps=max(1, flags.steps // 20),
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
        )
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=train, eval_dataset=validation)
    trainer.train(resume_from_checkpoint=flags.resume)
    loss = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        blocks = trainer.model_wrapped.basic_optimizer.metrics()["preconditioned_blocks"]
        print(f"validation loss {loss:.3f}; the first rank preconditions {blocks:.0f} blocks")


if __name__ == "__main__":
    main()
