"""Optimizers that a JSON may name although neither DeepSpeed nor ds-shampoo builds them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ds_shampoo.algorithm.momentum import MomentumSchedule
from ds_shampoo.algorithm.selection import Role, roles


class OptimizerError(ValueError):
    """An optimizer section that can't be used; the message names the key."""


class ByRole(Optimizer):
    """Hidden matrices by the optimizer that a subclass brings, and the rest by AdamW at rates by role.

    A schedule sets one rate. Embeddings, output heads and vectors take multiples of it; what else is no hidden matrix
    of the subclass's (convolutions, say) takes that rate itself.

    Attributes:
        only_matrices: whether convolutions and other tensors of more than two dimensions are left to AdamW.
    """

    only_matrices = True

    def __init__(
        self,
        model: nn.Module,
        hidden: Callable[[Sequence[nn.Parameter]], Optimizer],
        momentum: MomentumSchedule | None = None,
        /,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: Sequence[float] = (0.9, 0.95),
        eps: float = 1e-8,
        embedding_lr_scale: float = 1.0,
        head_lr_scale: float = 1.0,
        vector_lr_scale: float = 1.0,
        other_weight_decay: float | None = None,
    ) -> None:
        """
        Args:
            hidden: makes the optimizer of the hidden matrices; their rate and decay are set here.
            momentum: of the groups of `hidden` that have such a key, from its second value on; None leaves it alone.
            lr: the rate that a schedule sets; its decay is decoupled, in parts of each parameter's own rate.
            betas, eps: AdamW's for everything but the hidden matrices.
            embedding_lr_scale, head_lr_scale, vector_lr_scale: rates as multiples of `lr`.
            other_weight_decay: of everything but the hidden matrices; None is `weight_decay`.
        """
        matrices, others = self._sorted(model)
        scales = {"embedding": embedding_lr_scale, "head": head_lr_scale, "vector": vector_lr_scale, "other": 1.0}
        for name, scale in scales.items():
            if scale < 0:
                raise ValueError(f"{name}_lr_scale = {scale}: must be at least 0")
        self._momentum, self._steps = momentum, 0
        self._parts: list[Optimizer] = []
        if matrices:
            self._parts.append(hidden(matrices))
            for group in self._parts[0].param_groups:
                group |= {"lr": lr, "lr_scale": 1.0, "weight_decay": weight_decay}
        groups = [{"params": others[name], "lr_scale": scales[name]} for name in scales if others[name]]
        if groups:
            decay = weight_decay if other_weight_decay is None else other_weight_decay
            self._parts.append(torch.optim.AdamW(groups, lr=lr, betas=tuple(betas), eps=eps, weight_decay=decay))
        everything = [p for part in self._parts for group in part.param_groups for p in group["params"]]
        super().__init__([{"params": everything}], {"lr": lr})
        # A schedule that sets the rate of these groups sets it where it is used.
        self.param_groups = [group for part in self._parts for group in part.param_groups]

    def _sorted(self, model: nn.Module) -> tuple[list[nn.Parameter], dict[str, list[nn.Parameter]]]:
        """The hidden matrices, and everything else by what its rate goes by."""
        role = roles(model)
        matrices: list[nn.Parameter] = []
        others: dict[str, list[nn.Parameter]] = {"embedding": [], "head": [], "vector": [], "other": []}
        for p in model.parameters():
            if not p.requires_grad:
                continue
            if role[id(p)] is Role.WEIGHT and (p.ndim == 2 or (p.ndim > 2 and not self.only_matrices)):
                matrices.append(p)
            elif role[id(p)] is Role.EMBEDDING:
                others["embedding"].append(p)
            elif p.ndim < 2:
                others["vector"].append(p)
            else:
                others["head" if role[id(p)] is Role.HEAD else "other"].append(p)
        return matrices, others

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self._steps += 1
        for part in self._parts:
            rates = [group["lr"] for group in part.param_groups]
            for group in part.param_groups:
                group["lr"] *= group["lr_scale"]
                if self._momentum and "momentum" in group:
                    group["momentum"] = self._momentum.at(self._steps + 1)
            part.step()
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts], "steps": self._steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        for part, state in zip(self._parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._steps = state_dict["steps"]
        self.param_groups = [group for part in self._parts for group in part.param_groups]


class TorchMuon(ByRole):
    """torch.optim.Muon for the hidden matrices, and AdamW for everything else.

    Muon's update is scaled to AdamW's root mean square ("match_rms_adamw"), so that one rate suits both. Convolutions
    are left to AdamW: torch's Muon takes matrices only.
    """

    def __init__(
        self,
        model: nn.Module,
        /,
        *,
        momentum: float = 0.95,
        momentum_start: float = 0.85,
        momentum_warmup: int = 0,
        nesterov: bool = True,
        ns_steps: int = 5,
        **by_role: Any,
    ) -> None:
        """
        Args:
            momentum, momentum_start, momentum_warmup: it rises from the second to the first within so many steps.
            nesterov, ns_steps: torch.optim.Muon's own.
            by_role: ByRole's.
        """

        def muon(matrices: Sequence[nn.Parameter]) -> Optimizer:
            settings = {"nesterov": nesterov, "ns_steps": ns_steps, "adjust_lr_fn": "match_rms_adamw"}
            return torch.optim.Muon(matrices, momentum=momentum, **settings)

        super().__init__(model, muon, MomentumSchedule(momentum, momentum_warmup, momentum_start), **by_role)


class AdamWByRole(ByRole):
    """AdamW for all, with rates by role."""

    only_matrices = False

    def __init__(
        self, model: nn.Module, /, *, betas: Sequence[float] = (0.9, 0.95), eps: float = 1e-8, **by_role: Any
    ) -> None:
        def adamw(matrices: Sequence[nn.Parameter]) -> Optimizer:
            return torch.optim.AdamW(matrices, betas=tuple(betas), eps=eps)

        super().__init__(model, adamw, betas=betas, eps=eps, **by_role)


BUILT_HERE = {"TorchMuon": TorchMuon, "AdamWByRole": AdamWByRole}


def take_optimizer(config: dict[str, Any], model: nn.Module) -> Optimizer | None:
    """The optimizer that is to be built here; its section then leaves the JSON. None where DeepSpeed builds it.

    A type is one of `BUILT_HERE`, or "module:Class" with a subclass of ByRole that any module on the path defines.

    Raises:
        OptimizerError: for a class that isn't there, under ZeRO, whose flat shards have no matrices, and for a key or
            value that the class refuses.
    """
    section = config.get("optimizer", {})
    name = section.get("type")
    if not isinstance(name, str) or (name not in BUILT_HERE and ":" not in name):
        return None
    kind = BUILT_HERE.get(name) or _found(name)
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage or config.get("bf16", {}).get("enabled") or config.get("fp16", {}).get("enabled"):
        raise OptimizerError(f"optimizer.type = {name!r}: needs whole fp32 matrices, so ZeRO stage 0 and fp32")
    params, allowed = section.get("params", {}), settings_of(kind)
    for key in params.keys() - allowed:
        raise OptimizerError(f"optimizer.params.{key} = {params[key]!r}: {name} takes {', '.join(sorted(allowed))}")
    try:
        optimizer = kind(model, **params)
    except (TypeError, ValueError) as error:
        raise OptimizerError(f"optimizer.params: {name}: {error}") from None
    del config["optimizer"]
    return optimizer


def settings_of(kind: type[ByRole]) -> set[str]:
    """The keys that a class takes: its own named arguments, and those of the classes that it hands the rest to."""
    names: set[str] = set()
    for each in kind.__mro__:
        if "__init__" not in vars(each):
            continue
        arguments = inspect.signature(each.__init__).parameters.values()
        names |= {argument.name for argument in arguments if argument.kind is argument.KEYWORD_ONLY}
        if not any(argument.kind is argument.VAR_KEYWORD for argument in arguments):
            break
    return names


def _found(name: str) -> type[ByRole]:
    module, _, attribute = name.partition(":")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise OptimizerError(f"optimizer.type = {name!r}: {error}") from None
    if not (isinstance(kind, type) and issubclass(kind, ByRole)):
        raise OptimizerError(f"optimizer.type = {name!r}: must be a subclass of optimizers.ByRole")
    return kind
