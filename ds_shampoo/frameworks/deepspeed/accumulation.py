"""Whether an engine holds gradients of a step that is not done: no checkpoint has a place for them.

How many micro-batches make a step is not the engine's to know: trainers set the boundary themselves, change the batch
size, or end an epoch early. So what is asked is whether a gradient came in since the last step.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from ds_shampoo.optimizer import Shampoo


class Accumulation:
    """Watches the parameters of one engine."""

    def __init__(self, engine: Any, optimizer: Shampoo) -> None:
        self._engine = weakref.ref(engine)
        # DeepSpeed counts a step that overflowed too, and drops its gradients like those of any other.
        self._step: int | None = None
        for parameter in engine.module.parameters():
            if parameter.is_floating_point():
                self._watch(parameter)
        optimizer.register_step_post_hook(lambda *_: self.forget())

    def under_way(self) -> bool:
        """Whether gradients came in and no step followed."""
        engine = self._engine()
        if engine is None or self._step != engine.global_steps:
            return False
        # Without a wrapper of DeepSpeed's the gradients are the parameters', and whoever clears them drops them.
        plain = isinstance(engine.optimizer, Shampoo)
        return not plain or any(parameter.grad is not None for parameter in engine.module.parameters())

    def forget(self) -> None:
        """For a step that is done."""
        self._step = None

    def recount(self, under_way: bool) -> None:
        """For an engine whose count of steps was set from elsewhere: what was under way before stays so."""
        engine = self._engine()
        self._step = engine.global_steps if under_way and engine is not None else None

    def _watch(self, parameter: Tensor) -> None:
        trained = parameter.requires_grad
        parameter.requires_grad_(True)  # for what is frozen now and trained later: torch takes no hook otherwise
        parameter.register_post_accumulate_grad_hook(self._note)  # type: ignore[no-untyped-call]
        parameter.requires_grad_(trained)

    def _note(self, _: Tensor) -> None:
        engine = self._engine()
        if engine is not None:
            self._step = engine.global_steps
