"""Optimizers that a JSON may name although neither DeepSpeed nor ds-shampoo builds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ds_shampoo.algorithm.selection import Role, roles

TORCH_MUON = "TorchMuon"

# torch.optim.Muon's own arguments that the JSON may set; the others are AdamW's.
_MUON_KEYS = ("momentum", "nesterov", "ns_steps")


class OptimizerError(ValueError):
    """An optimizer section that can't be used; the message names the key."""


class TorchMuon(Optimizer):
    """torch.optim.Muon for the hidden matrices and AdamW for everything else, under one learning rate.

    Muon's update is scaled to AdamW's root mean square ("match_rms_adamw"), so that one rate suits both. Convolutions
    are left to AdamW: torch's Muon takes matrices only.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        **muon: Any,
    ) -> None:
        role = roles(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.ndim == 2 and role[id(p)] is Role.WEIGHT]
        taken = {id(p) for p in matrices}
        others = [p for p in trained if id(p) not in taken]
        self._parts: list[Optimizer] = []
        if matrices:
            settings = {"lr": lr, "weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw", **muon}
            self._parts.append(torch.optim.Muon(matrices, **settings))
        if others:
            self._parts.append(torch.optim.AdamW(others, lr=lr, weight_decay=weight_decay, betas=betas))
        super().__init__([{"params": matrices + others}], {"lr": lr})
        # A schedule that sets the rate of these groups sets it where it is used.
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self._parts for group in part.param_groups]


def take_optimizer(config: dict[str, Any], model: nn.Module) -> Optimizer | None:
    """The optimizer that is to be built here; its section then leaves the JSON. None where DeepSpeed builds it.

    Raises:
        OptimizerError: for TorchMuon under ZeRO, whose flat shards have no matrices, and for an unknown key of it.
    """
    section = config.get("optimizer", {})
    if section.get("type") != TORCH_MUON:
        return None
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage or config.get("bf16", {}).get("enabled") or config.get("fp16", {}).get("enabled"):
        raise OptimizerError(f"optimizer.type = {TORCH_MUON!r}: needs whole fp32 matrices, so ZeRO stage 0 and fp32")
    params = section.get("params", {})
    allowed = {"lr", "weight_decay", "betas", *_MUON_KEYS}
    for key in params.keys() - allowed:
        raise OptimizerError(
            f"optimizer.params.{key} = {params[key]!r}: {TORCH_MUON} takes {', '.join(sorted(allowed))}"
        )
    del config["optimizer"]
    return TorchMuon(model, **params)
