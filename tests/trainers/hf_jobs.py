"""What the ranks run of Hugging Face's Trainer, TRL's SFTTrainer, and Trainer on PEFT's LoRA."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

import ds_shampoo
from ds_shampoo import Shampoo
from tests.distributed.jobs import flat
from tests.trainers.fresh import fresh, listening
from tests.trainers.models import CONTEXT, SHAMPOO, byte_tokenizer, gpt2, llama, paragraphs, windows
from tests.trainers.outcome import ACCUMULATION, SAVE_AT, STEPS, Outcome

Given = Literal["by the JSON", "factory", "object"]


class Watch(TrainerCallback):
    """Keeps the weights after every step."""

    def __init__(self) -> None:
        self.weights: dict[int, np.ndarray] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.weights[state.global_step] = flat(model)


def arguments_of(kind: type[TrainingArguments], folder: str, **changed: Any) -> TrainingArguments:
    """Eight steps of two micro-batches; evaluated and saved after four and eight of them."""
    return kind(
        **{
            "output_dir": folder,
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": ACCUMULATION,
            "learning_rate": 4e-3,
            "weight_decay": 0.02,
            "warmup_steps": 2,
            "lr_scheduler_type": "cosine",
            "logging_steps": 1,
            "eval_strategy": "steps",
            "save_strategy": "steps",
            "eval_steps": SAVE_AT,
            "save_steps": SAVE_AT,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            **changed,
        }
    )


def trainer_of(library: str, arguments: TrainingArguments, given: Given) -> Trainer:
    """The same small job by one of the three libraries, its optimizer given in one of the ways."""
    torch.manual_seed(0)
    train, validation = windows()
    if library == "trl":
        texts, held_out = paragraphs()
        tokenizer = byte_tokenizer()
        return SFTTrainer(
            llama(len(tokenizer)), arguments, train_dataset=texts, eval_dataset=held_out, processing_class=tokenizer
        )
    lora = LoraConfig(r=4, target_modules="all-linear")
    model = gpt2() if library == "transformers" else get_peft_model(llama(), lora)
    options: dict[str, Any] = {}
    if given == "factory":
        options["optimizer_cls_and_kwargs"] = ds_shampoo.for_trainer(model, lr=4e-3, **SHAMPOO)
    if given == "object":
        optimizer = Shampoo(model.parameters(), model=model, lr=4e-3, weight_decay=0.02, **SHAMPOO)
        options["optimizers"] = (optimizer, None)
    return Trainer(model, arguments, train_dataset=train, eval_dataset=validation, **options)


def by_trainer(
    library: str, folder: str, resume: str | None = None, given: Given = "by the JSON", **changed: Any
) -> Outcome:
    """Trains from the beginning, or from the checkpoint that `resume` names.

    Args:
        given: how Trainer gets its optimizer.
        changed: what differs from `arguments_of`.
    """
    kind = SFTConfig if library == "trl" else TrainingArguments
    if library == "trl":
        changed = {"max_length": CONTEXT, "bf16": False, **changed}
    with fresh(), listening() as heard:
        trainer = trainer_of(library, arguments_of(kind, folder, **changed), given)
        watch, found = Watch(), Outcome()
        trainer.add_callback(watch)
        trainer.train(resume_from_checkpoint=resume)
        history = trainer.state.log_history
        found.weights, found.end = watch.weights, flat(trainer.model)
        found.losses = [entry["loss"] for entry in history if "loss" in entry]
        found.held_out = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        found.note(optimizer_of(trainer), heard)
        return found


def optimizer_of(trainer: Trainer) -> Any:
    """The optimizer that a trainer has wrapped."""
    return getattr(trainer.model_wrapped, "basic_optimizer", None) or trainer.optimizer.optimizer
