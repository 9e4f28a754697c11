"""TRL's SFTTrainer with Shampoo, which DeepSpeed's JSON names.

deepspeed --num_gpus 2 examples/trl_sft.py --deepspeed examples/zero3.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import ds_shampoo  # noqa: F401  DeepSpeed knows "type": "Shampoo" from here on
from text import read

CONTEXT = 64


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Each byte is a token: in a real job, that of the model that you fine-tune."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*alphabet, "<end>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def paragraphs(path: Path | None) -> tuple[Dataset, Dataset]:
    """A text's paragraphs as TRL's datasets of `text`; the last fiftieth of them is held out."""
    rows = [{"text": text} for text in read(path).split("\n\n") if text.strip()]
    cut = len(rows) - len(rows) // 50
    return Dataset.from_list(rows[:cut]), Dataset.from_list(rows[cut:])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed", default=str(Path(__file__).with_name("zero3.json")), help="DeepSpeed's JSON")
    parser.add_argument("--text", type=Path, help="a text file; Python's language reference without it")
    parser.add_argument("--output", default="runs/trl_sft", help="a folder for checkpoints")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in the folder")
    parser.add_argument("--local_rank", type=int, help="set by DeepSpeed's launcher")
    return parser.parse_args()


def main() -> None:
    flags = parse()
    train, validation = paragraphs(flags.text)
    arguments = SFTConfig(
        output_dir=flags.output,
        deepspeed=flags.deepspeed,
        max_steps=flags.steps,
        max_length=CONTEXT,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=4e-3,
        weight_decay=0.01,
        save_steps=max(1, flags.steps // 2),
        logging_steps=max(1, flags.steps // 20),
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    )
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=train, eval_dataset=validation, processing_class=tokenizer
    )
    trainer.train(resume_from_checkpoint=flags.resume)
    loss = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        blocks = trainer.model_wrapped.basic_optimizer.metrics()["preconditioned_blocks"]
        print(f"validation loss {loss:.3f}; the first rank preconditions {blocks:.0f} blocks")


if __name__ == "__main__":
    main()
