"""PEFT's LoRA under Hugging Face's Trainer with Shampoo, which DeepSpeed's JSON names.

deepspeed --num_gpus 2 examples/peft_lora.py --deepspeed examples/zero2.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import ds_shampoo  # noqa: F401  DeepSpeed knows "type": "Shampoo" from here on
from text import VOCABULARY, train_and_validation

CONTEXT = 64


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed", default=str(Path(__file__).with_name("zero2.json")), help="DeepSpeed's JSON")
    parser.add_argument("--text", type=Path, help="a text file; Python's language reference without it")
    parser.add_argument("--output", default="runs/peft_lora", help="a folder for checkpoints")
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
        max_steps=flags.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=4e-3,
        save_steps=max(1, flags.steps // 2),
        logging_steps=max(1, flags.steps // 20),
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(  # in a real job, from_pretrained
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        )
    )
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    trainer = Trainer(model=model, args=arguments, train_dataset=train, eval_dataset=validation)
    trainer.train(resume_from_checkpoint=flags.resume)
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()  # the adapter alone
    if trainer.is_world_process_zero():
        blocks = trainer.model_wrapped.basic_optimizer.metrics()["preconditioned_blocks"]
        print(f"validation loss {loss:.3f}; the first rank preconditions {blocks:.0f} blocks")


if __name__ == "__main__":
    main()
