"""What the ranks run of Hugging Face's Trainer, TRL's SFTTrainer, and Trainer on PEFT's LoRA."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from tests.distributed.jobs import flat
from tests.trainers.fresh import fresh, listening
from tests.trainers.models import CONTEXT, byte_tokenizer, gpt2, llama, paragraphs, windows

STEPS = 8
SAVE_AT = 4
ACCUMULATION = 2


@dataclass
class Outcome:
    """What a job left on this rank.

    Attributes:
        weights: after each step, all parameters flat.
        end: the same when `train` has returned.
        losses: those that the trainer logged, step by step.
        held_out: those of its evaluations.
        metrics: the optimizer's.
        groups: its param groups, without parameters.
        warnings: what ds_shampoo warned of.
    """

    weights: dict[int, np.ndarray]
    end: np.ndarray
    losses: list[float]
    held_out: list[float]
    metrics: dict[str, float]
    groups: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)


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


def trainer_of(library: str, arguments: TrainingArguments, **options: Any) -> Trainer:
    """The same small job by one of the three."""
    torch.manual_seed(0)
    train, validation = windows()
    if library == "trl":
        texts, held_out = paragraphs()
        tokenizer = byte_tokenizer()
        return SFTTrainer(
            llama(len(tokenizer)), arguments, train_dataset=texts, eval_dataset=held_out, processing_class=tokenizer
        )
    model = (
        gpt2() if library == "transformers" else get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear"))
    )
    return Trainer(model, arguments, train_dataset=train, eval_dataset=validation, **options)


def by_trainer(
    library: str,
    folder: str,
    resume: str | None = None,
    options: Callable[[Trainer], dict[str, Any]] | None = None,
    **changed: Any,
) -> Outcome:
    """Trains from the beginning, or from the checkpoint that `resume` names.

    Args:
        changed: what differs from `arguments_of`.
    """
    kind = SFTConfig if library == "trl" else TrainingArguments
    if library == "trl":
        changed = {"max_length": CONTEXT, "bf16": False, **changed}
    with fresh(), listening() as heard:
        trainer = trainer_of(library, arguments_of(kind, folder, **changed))
        watch = Watch()
        trainer.add_callback(watch)
        trainer.train(resume_from_checkpoint=resume)
        optimizer = getattr(trainer.model_wrapped, "basic_optimizer", None) or trainer.optimizer.optimizer
        history = trainer.state.log_history
        return Outcome(
            watch.weights,
            flat(trainer.model),
            [entry["loss"] for entry in history if "loss" in entry],
            [entry["eval_loss"] for entry in history if "eval_loss" in entry],
            optimizer.metrics(),
            [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups],
            [record.getMessage() for record in heard if record.levelno >= logging.WARNING],
        )
