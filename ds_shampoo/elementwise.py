"""The elementwise half of a step on one tensor of a param group: a whole parameter or ZeRO's flat shard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ds_shampoo.algorithm import grafting
from ds_shampoo.config import GroupSettings


def new_state(param: Tensor) -> dict[str, Any]:
    """Adam's names, so that DeepSpeed's checkpoint and fragment interfaces find what they expect; all fp32."""
    return {
        "step": 0,
        "exp_avg": torch.zeros(param.shape, dtype=torch.float32, device=param.device),
        "exp_avg_sq": torch.zeros(param.shape, dtype=torch.float32, device=param.device),
    }


class TensorStep:
    """What one tensor goes through in one step; everything flat and fp32 but the parameter itself.

    Attributes:
        grad: the gradient, with the L2 decay added where that is asked for.
        vector: what is preconditioned: the filtered gradient, or the gradient for momentum "after".
        update: the grafting method's own step for it, until directions are written over it.
    """

    def __init__(self, param: Tensor, grad: Tensor, state: dict[str, Any], settings: GroupSettings) -> None:
        if grad.is_sparse:
            raise RuntimeError("Shampoo does not support sparse gradients; build the embedding with sparse=False")
        self._settings = settings
        self._param = param
        state["step"] += 1
        self.step = int(state["step"])  # a tensor on the host where a framework keeps it as torch's Adam does
        self._exp_avg: Tensor = state["exp_avg"].view(-1)
        self._exp_avg_sq: Tensor = state["exp_avg_sq"].view(-1)
        self.grad = grad.reshape(-1).to(torch.float32)
        if settings.weight_decay and not settings.decoupled_weight_decay:
            self.grad = self.grad.add(param.reshape(-1), alpha=settings.weight_decay)
        self._filters = settings.momentum == "before"
        self.vector = torch.empty_like(self.grad) if self._filters else self.grad
        self.update = torch.empty_like(self.grad)
        self._chunks = list(grafting.chunks(self.grad.numel(), self.grad.device))

    def filter_and_graft(self) -> None:
        """Moments, the vector and its grafting step, in one pass over the data."""
        for chunk in self._chunks:
            self._filter(chunk)
            self._graft(chunk, self.grad, self.vector)

    def filter(self) -> None:
        """The vector alone, for a grafting method that must know norms before it can go on."""
        for chunk in self._chunks:
            self._filter(chunk)

    def graft(self, grad: Tensor, vector: Tensor) -> None:
        """The grafting step, for a gradient and a vector that were divided by their norms."""
        for chunk in self._chunks:
            self._graft(chunk, grad, vector)

    def finish(self) -> None:
        """Momentum "after", weight decay and the step on the parameter; `update` is spent."""
        s = self._settings
        decay = s.weight_decay if s.decoupled_weight_decay else 0.0
        flat = self._param.view(-1) if self._param.is_contiguous() else None
        for chunk in self._chunks:
            update = self.update[chunk]
            if not self._filters:
                grafting.average(update, self._exp_avg[chunk], update, self.step, s.betas[0], s.nesterov)
            if flat is not None:
                grafting.apply_update(flat[chunk], update, s.lr, decay)
        if flat is None:
            grafting.apply_update(self._param, self.update.view(self._param.shape), s.lr, decay)

    def _filter(self, chunk: slice) -> None:
        if self._filters:
            s = self._settings
            grafting.average(
                self.grad[chunk], self._exp_avg[chunk], self.vector[chunk], self.step, s.betas[0], s.nesterov
            )

    def _graft(self, chunk: slice, grad: Tensor, vector: Tensor) -> None:
        s = self._settings
        grafting.grafting_step(
            s.grafting,
            vector[chunk],
            grad[chunk],
            self._exp_avg_sq[chunk],
            self.update[chunk],
            self.step,
            s.betas[1],
            s.eps,
        )
