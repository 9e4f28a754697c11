"""The optimizers that are timed against each other, each built with settings a user would start from."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.state import state_bytes
from benchmarks.workload import hidden_matrices

BLOCK_SIZE = 256
ROOT_INTERVAL = 10
WEIGHT_DECAY = 0.01

Build = Callable[[nn.Module, float], Sequence[Optimizer]]


@dataclass(frozen=True, slots=True)
class Contender:
    """One optimizer, or several that share a model, under the name the table shows.

    Attributes:
        lr: peak learning rate, one at which this optimizer trains this model well.
        build: makes the optimizers for a model and a learning rate.
        first_root, root_interval: it takes roots (or eigenvectors) at its steps `first_root`,
            `first_root + root_interval` and so on, counted from 1; None where it has none.
        module: what has to be importable.
        fp32: its products are forced from bfloat16 to fp32.
    """

    name: str
    lr: float
    build: Build
    first_root: int | None = None
    root_interval: int | None = None
    module: str = "torch"
    fp32: bool = False

    def missing(self) -> str | None:
        """Why this one can't run here, or None."""
        if importlib.util.find_spec(self.module) is None:
            return f"{self.module} is not installed"
        if self.build is _muon and not hasattr(torch.optim, "Muon"):
            return f"torch {torch.__version__} has no torch.optim.Muon"
        return None

    def takes_roots(self, step: int) -> bool:
        """Whether its step number `step` (from 1) computes roots."""
        if self.first_root is None or self.root_interval is None:
            return False
        return step >= self.first_root and (step - self.first_root) % self.root_interval == 0


class Lane:
    """One contender at work: its copy of the model, its optimizers, and what was measured of them."""

    def __init__(self, contender: Contender, model: nn.Module) -> None:
        self.contender = contender
        self.model = model
        self.optimizers = contender.build(model, contender.lr)
        self.step_ms: list[float] = []
        self.losses: list[float] = []

    def step(self, tokens: Tensor, targets: Tensor, lr_scale: float) -> None:
        """Forward and backward untimed, then the optimizers' step in this thread's processor time."""
        self.model.zero_grad(set_to_none=True)
        loss = self.model(tokens, targets)
        loss.backward()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.contender.lr * lr_scale
        with _without_bfloat16() if self.contender.fp32 else contextlib.nullcontext():
            start = time.thread_time()
            for optimizer in self.optimizers:
                optimizer.step()
            self.step_ms.append(1e3 * (time.thread_time() - start))
        self.losses.append(loss.item())

    def root_ms(self) -> float | None:
        """Milliseconds per step that root threads were busy, beside the step; None where there are no such threads."""
        found = [optimizer.metrics() for optimizer in self.optimizers if hasattr(optimizer, "metrics")]
        busy = sum(metrics["root_busy_ms"] for metrics in found)
        return busy / len(self.step_ms) if busy else None

    def state_bytes(self) -> int:
        parameters = list(self.model.parameters())
        return sum(state_bytes(optimizer, parameters) for optimizer in self.optimizers)


def _without_bfloat16() -> contextlib.AbstractContextManager[object]:
    """Makes `Tensor.bfloat16` copy without casting: torch's Muon then iterates in its gradients' own fp32."""
    return mock.patch.object(Tensor, "bfloat16", Tensor.clone)


def _all_but(model: nn.Module, taken: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    excluded = {id(p) for p in taken}
    return [p for p in model.parameters() if id(p) not in excluded]


def _adamw(model: nn.Module, lr: float) -> Sequence[Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY)]


def _muon(model: nn.Module, lr: float) -> Sequence[Optimizer]:
    matrices = list(hidden_matrices(model).values())
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(_all_but(model, matrices), lr=lr, weight_decay=WEIGHT_DECAY)]


def _shampoo(model: nn.Module, lr: float, preconditioner: str = "shampoo", **settings: object) -> Sequence[Optimizer]:
    from ds_shampoo import Shampoo

    return [
        Shampoo(
            model.parameters(),
            lr=lr,
            model=model,
            weight_decay=WEIGHT_DECAY,
            block_size=BLOCK_SIZE,
            preconditioner=preconditioner,
            **{"root_interval": ROOT_INTERVAL, **settings},
        )
    ]


def _shampoo_inline(model: nn.Module, lr: float) -> Sequence[Optimizer]:
    return _shampoo(model, lr, root_overlap=False)


def _shampoo_medium(model: nn.Module, lr: float) -> Sequence[Optimizer]:
    return _shampoo(model, lr, matmul_precision="medium")


def _spectral(model: nn.Module, lr: float, **settings: object) -> Sequence[Optimizer]:
    return _shampoo(model, lr, "spectral", **settings)


def _spectral_medium(model: nn.Module, lr: float) -> Sequence[Optimizer]:
    return _spectral(model, lr, matmul_precision="medium")


def _polar(model: nn.Module, lr: float, **settings: object) -> Sequence[Optimizer]:
    return _shampoo(model, lr, "polar", root_interval=None, **settings)


def _polar_fp32(model: nn.Module, lr: float) -> Sequence[Optimizer]:
    return _polar(model, lr, matmul_precision="highest")


def _scalable_shampoo(model: nn.Module, lr: float) -> Sequence[Optimizer]:
    from pytorch_optimizer import ScalableShampoo

    return [
        ScalableShampoo(
            model.parameters(),
            lr=lr,
            weight_decay=WEIGHT_DECAY,
            decoupled_weight_decay=True,
            block_size=BLOCK_SIZE,
            preconditioning_compute_steps=ROOT_INTERVAL,
            start_preconditioning_step=1,
            # RMSProp's size and an averaged momentum: with its defaults, SGD's size and a summed momentum, it
            # wants learning rates of another order than everything else here.
            graft_type=3,
            moving_average_for_momentum=True,
        )
    ]


def _soap(model: nn.Module, lr: float) -> Sequence[Optimizer]:
    from pytorch_optimizer import SOAP

    return [SOAP(model.parameters(), lr=lr, weight_decay=WEIGHT_DECAY, precondition_frequency=ROOT_INTERVAL)]


MUON = Contender("muon", 2e-3, _muon)
MUON_FP32 = Contender("muon-fp32", 2e-3, _muon, fp32=True)
# Its roots are computed by a host thread, whose time does not count here.
SHAMPOO = Contender("ds-shampoo", 4e-3, _shampoo, module="ds_shampoo")
# Products whose inputs may be rounded to bfloat16, as those of torch's Muon are.
SHAMPOO_MEDIUM = Contender("ds-shampoo-medium", 4e-3, _shampoo_medium, module="ds_shampoo")
# Five Newton-Schulz steps and a second pair of root products in every direction.
SPECTRAL = Contender("ds-shampoo-spectral", 8e-3, _spectral, module="ds_shampoo")
# The iterations in bfloat16, as those of torch's Muon.
SPECTRAL_MEDIUM = Contender("ds-shampoo-spectral-medium", 8e-3, _spectral_medium, module="ds_shampoo")
# What the package does where nobody says otherwise: three cubic steps.
POLAR = Contender("ds-shampoo-polar", 4e-3, _polar, module="ds_shampoo")
POLAR_FP32 = Contender("ds-shampoo-polar-fp32", 4e-3, _polar_fp32, module="ds_shampoo")
# Roots in the step: those of a tenth of the blocks in every one.
SHAMPOO_INLINE = Contender("ds-shampoo-inline", 4e-3, _shampoo_inline, 1, 1, "ds_shampoo")
SCALABLE_SHAMPOO = Contender(
    "scalable-shampoo", 1e-3, _scalable_shampoo, ROOT_INTERVAL, ROOT_INTERVAL, "pytorch_optimizer"
)
# It counts from its second step on: the first only fills the statistics.
SOAP = Contender("soap", 3e-3, _soap, ROOT_INTERVAL + 1, ROOT_INTERVAL, "pytorch_optimizer")

CONTENDERS = (
    Contender("adamw", 1e-3, _adamw),
    MUON,
    MUON_FP32,
    SCALABLE_SHAMPOO,
    SOAP,
    SHAMPOO,
    SHAMPOO_MEDIUM,
    SPECTRAL,
    SPECTRAL_MEDIUM,
    POLAR,
    POLAR_FP32,
    SHAMPOO_INLINE,
)
