"""What a trainer's job leaves, whichever trainer it was."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.optim import Optimizer

from ds_shampoo import Shampoo

STEPS = 8
SAVE_AT = 4
ACCUMULATION = 2


@dataclass
class Outcome:
    """Of one rank.

    Attributes:
        weights: after each step, all parameters flat.
        losses: of every micro-batch, or as the trainer logs them.
        held_out: those of its evaluations.
        end: the parameters when the trainer has returned.
        metrics: the optimizer's.
        groups: its param groups, without parameters.
        optimizer: the name of the optimizer's class.
        layout: that of its layout's class.
        warnings: what ds_shampoo warned of.
    """

    weights: dict[int, np.ndarray] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    end: np.ndarray = field(default_factory=lambda: np.empty(0))
    metrics: dict[str, float] = field(default_factory=dict)
    groups: list[dict[str, Any]] = field(default_factory=list)
    optimizer: str = ""
    layout: str = ""
    warnings: list[str] = field(default_factory=list)

    def note(self, optimizer: Optimizer, heard: Sequence[logging.LogRecord]) -> None:
        """What the optimizer has to say at the end, if it is Shampoo."""
        if isinstance(optimizer, Shampoo):
            self.metrics, self.layout = optimizer.metrics(), type(optimizer.layout).__name__
        self.optimizer = type(optimizer).__name__
        self.groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        self.warnings = [record.getMessage() for record in heard if record.levelno >= logging.WARNING]


def check(whole: Sequence[Outcome], resumed: Sequence[Outcome]) -> None:
    """A run that goes on from a checkpoint takes the steps that the uninterrupted one took, bit for bit, on all ranks.

    Blocks are preconditioned in both, and ranks hold one model.
    """
    for one, other in zip(whole, resumed, strict=True):
        assert sorted(one.weights) == [*range(1, STEPS + 1)]
        assert sorted(other.weights) == [*range(SAVE_AT + 1, STEPS + 1)]
        assert all(np.array_equal(other.weights[step], one.weights[step]) for step in other.weights)
        assert all(np.array_equal(one.weights[step], whole[0].weights[step]) for step in one.weights)
        assert not np.array_equal(one.weights[1], one.weights[2])
        assert other.losses == one.losses[-len(other.losses) :]
        assert one.metrics["preconditioned_blocks"] > 0
        assert other.metrics["preconditioned_blocks"] == other.metrics["owned_blocks"] > 0
        assert min(one.metrics["root_updates"], other.metrics["root_updates"]) > 0
