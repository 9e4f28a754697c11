"""SOAP and facebookresearch's Shampoo as their formulas have them, for jobs: `"type": "benchmarks.prototypes:Soap"`.

Both take whole hidden matrices; the rest of the model takes the same AdamW by role as torch's Muon has beside it. They
are prototypes: roots and bases are computed in the step, in fp32, and nothing is shared among ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ds_shampoo.algorithm.momentum import MomentumSchedule
from optimizers import ByRole

# What an eigenvalue has to exceed, in parts of the largest: fp32's resolution times the factor's order.
_RESOLUTION = torch.finfo(torch.float32).eps


class _Matrices(Optimizer):
    """Steps matrices by a direction that a subclass computes, with decoupled weight decay."""

    def __init__(self, params: Sequence[nn.Parameter], **settings: Any) -> None:
        super().__init__(params, {"lr": 0.0, "weight_decay": 0.0, **settings})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                direction = self._direction(p.grad, self.state[p], group)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(direction, alpha=-group["lr"])

    def _direction(self, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        raise NotImplementedError


class _SoapMatrices(_Matrices):
    """Adam in the eigenbasis of Shampoo's statistics: arXiv 2409.11321, algorithm 3."""

    def _direction(self, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        beta = group["statistics_beta"]
        if not state:
            # The first gradient only gives the first basis.
            state |= {"step": 0, "left": grad @ grad.T, "right": grad.T @ grad, "momentum_left": 1.0}
            state |= {"left_basis": _eigenbasis(state["left"]), "right_basis": _eigenbasis(state["right"])}
            state |= {"exp_avg": torch.zeros_like(grad), "exp_avg_sq": torch.zeros_like(grad)}
            return torch.zeros_like(grad)
        state["step"] += 1
        average, square = state["exp_avg"], state["exp_avg_sq"]
        average.lerp_(grad, 1 - group["momentum"])
        state["momentum_left"] *= group["momentum"]
        left, right = state["left_basis"], state["right_basis"]
        square.lerp_((left.T @ grad @ right).square(), 1 - group["second_beta"])
        corrected = square / (1 - group["second_beta"] ** state["step"])
        rotated = (left.T @ average @ right) / (1 - state["momentum_left"])
        direction = left @ (rotated / (corrected.sqrt() + group["soap_eps"])) @ right.T
        state["left"].lerp_(grad @ grad.T, 1 - beta)
        state["right"].lerp_(grad.T @ grad, 1 - beta)
        if state["step"] % group["basis_interval"] == 0:
            state["left_basis"], order = _followed(state["left"], left)
            square = square[order]
            state["right_basis"], order = _followed(state["right"], right)
            state["exp_avg_sq"] = square[:, order]
        return direction


class _ShampooMatrices(_Matrices):
    """L^-e M R^-e with pseudo-inverses, at the length that grafting gives, as facebookresearch/optimizers has it."""

    def _direction(self, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        if not state:
            rows, columns = grad.shape
            state |= {"step": 0, "exp_avg": torch.zeros_like(grad), "exp_avg_sq": torch.zeros_like(grad)}
            state |= {
                "left": grad.new_zeros(rows, rows),
                "right": grad.new_zeros(columns, columns),
                "momentum_left": 1.0,
            }
        state["step"] += 1
        beta, step = group["statistics_beta"], state["step"]
        state["exp_avg"].lerp_(grad, 1 - group["momentum"])
        state["momentum_left"] *= group["momentum"]
        average = state["exp_avg"] / (1 - state["momentum_left"])
        state["left"].lerp_(grad @ grad.T, 1 - beta)
        state["right"].lerp_(grad.T @ grad, 1 - beta)
        if (step - 1) % group["root_interval"] == 0:
            for side in ("left", "right"):
                unbiased = state[side] / (1 - beta**step)
                state[f"{side}_root"] = pseudo_inverse_root(unbiased, group["exponent"])
        direction = state["left_root"] @ average @ state["right_root"]
        if group["grafting"] == "adam":
            state["exp_avg_sq"].lerp_(grad.square(), 1 - group["grafting_beta"])
            square = state["exp_avg_sq"] / (1 - group["grafting_beta"] ** step)
            length = (average / (square.sqrt() + group["grafting_eps"])).norm()
        else:
            length = torch.tensor(math.sqrt(len(grad)), device=grad.device, dtype=grad.dtype)
        norm = direction.norm()
        return direction * torch.where(norm > 0, length / norm, torch.zeros_like(norm))


def pseudo_inverse_root(statistics: Tensor, exponent: float) -> Tensor:
    """A^-exponent of a symmetric fp32 matrix [n, n]; what is below fp32's resolution of its largest eigenvalue is 0."""
    values, vectors = torch.linalg.eigh(statistics)
    cut = values[-1] * len(values) * _RESOLUTION
    powers = torch.where(values > cut, values.clamp_min(torch.finfo(values.dtype).tiny).pow(-exponent), 0.0)
    return (vectors * powers) @ vectors.T


def _eigenbasis(statistics: Tensor) -> Tensor:
    """Eigenvectors as columns, the largest eigenvalue's first."""
    return torch.linalg.eigh(statistics)[1].flip(1)


def _followed(statistics: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """A basis after one step of orthogonal iteration, and the order that its columns were brought into before."""
    moved = statistics @ basis
    order = (basis * moved).sum(0).argsort(descending=True)
    return torch.linalg.qr(moved[:, order])[0], order


class Soap(ByRole):
    """SOAP (arXiv 2409.11321) for the hidden matrices."""

    def __init__(
        self,
        model: nn.Module,
        /,
        *,
        momentum: float = 0.95,
        momentum_start: float = 0.85,
        momentum_warmup: int = 0,
        second_beta: float = 0.95,
        statistics_beta: float = 0.95,
        soap_eps: float = 1e-8,
        basis_interval: int = 10,
        **by_role: Any,
    ) -> None:
        """
        Args:
            momentum, momentum_start, momentum_warmup: the first beta, as in TorchMuon.
            second_beta, statistics_beta: of the second moment in the basis, and of the factors.
            soap_eps: Adam's epsilon in the basis.
            basis_interval: steps between two bases.
            by_role: ByRole's.
        """
        settings = {"momentum": momentum, "second_beta": second_beta, "statistics_beta": statistics_beta}
        hidden = _maker(_SoapMatrices, soap_eps=soap_eps, basis_interval=basis_interval, **settings)
        super().__init__(model, hidden, MomentumSchedule(momentum, momentum_warmup, momentum_start), **by_role)


class FacebookShampoo(ByRole):
    """facebookresearch's Distributed Shampoo in its best public settings, for the hidden matrices.

    Those are R. Anil's on modded-nanogpt's optimization track: both factors, exponent 1/4, pseudo-inverse, roots in
    every step, betas of 0.9, grafting to Adam with eps 1e-15. `exponent` 1/3 with `grafting` "sqrt_rows", which gives
    an m x n direction the norm sqrt(m), is a later proposal there.
    """

    def __init__(
        self,
        model: nn.Module,
        /,
        *,
        momentum: float = 0.9,
        momentum_start: float = 0.85,
        momentum_warmup: int = 0,
        statistics_beta: float = 0.9,
        exponent: float = 0.25,
        root_interval: int = 1,
        grafting: str = "adam",
        grafting_beta: float = 0.9,
        grafting_eps: float = 1e-15,
        **by_role: Any,
    ) -> None:
        """
        Args:
            momentum, momentum_start, momentum_warmup: the first beta, as in TorchMuon.
            statistics_beta: of the factors.
            exponent: of each factor, its sign turned.
            root_interval: steps between two roots.
            grafting, grafting_beta, grafting_eps: "adam" or "sqrt_rows"; Adam's second beta and epsilon.
            by_role: ByRole's.
        """
        if grafting not in ("adam", "sqrt_rows"):
            raise ValueError(f'grafting = {grafting!r}: must be "adam" or "sqrt_rows"')
        settings = {"momentum": momentum, "statistics_beta": statistics_beta, "exponent": exponent}
        settings |= {"root_interval": root_interval, "grafting": grafting}
        hidden = _maker(_ShampooMatrices, grafting_beta=grafting_beta, grafting_eps=grafting_eps, **settings)
        super().__init__(model, hidden, MomentumSchedule(momentum, momentum_warmup, momentum_start), **by_role)


def _maker(kind: type[_Matrices], **settings: Any) -> Callable[[Sequence[nn.Parameter]], Optimizer]:
    return lambda matrices: kind(matrices, **settings)
