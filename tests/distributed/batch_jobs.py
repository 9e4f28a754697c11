"""What the workers run: a layer's experts stacked in one parameter under the real DeepSpeed engine, or separate."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ds_shampoo
from ds_shampoo import Shampoo

EXPERTS, WIDTH, HIDDEN, BATCH = 4, 16, 12, 8


class Experts(nn.Module):
    """Gated units as Hugging Face's fused expert modules hold them: [experts, out, in]."""

    def __init__(self, told: bool) -> None:
        super().__init__()
        if told:
            self.num_experts = EXPERTS
        self.gate_up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * HIDDEN, WIDTH) * WIDTH**-0.5)
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) * HIDDEN**-0.5)

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        gate, up = torch.einsum("bi,boi->bo", x, self.gate_up_proj[expert]).chunk(2, dim=-1)
        return torch.einsum("bi,boi->bo", F.silu(gate) * up, self.down_proj[expert])


class SeparateExperts(nn.Module):
    """The same, with a parameter for every expert."""

    def __init__(self, fused: Experts) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = (
            nn.ParameterList([nn.Parameter(each.detach().clone()) for each in parameter])
            for parameter in (fused.gate_up_proj, fused.down_proj)
        )

    def forward(self, x: Tensor, expert: Tensor) -> Tensor:
        gate, up = torch.einsum("bi,boi->bo", x, torch.stack(list(self.gate_up_proj))[expert]).chunk(2, dim=-1)
        return torch.einsum("bi,boi->bo", F.silu(gate) * up, torch.stack(list(self.down_proj))[expert])


class Model(nn.Module):
    """Two layers, the second of experts, on data of which an expert gets none for a time."""

    def __init__(self, told: bool = True, separate: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH)
        fused = Experts(told)
        self.mixture = SeparateExperts(fused) if separate else fused

    def forward(self, x: Tensor, expert: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.mixture(torch.tanh(self.first(x)), expert), y)


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(BATCH, WIDTH, generator=generator) for _ in range(2))
    return x, torch.arange(BATCH) % (EXPERTS - 1 if 5 <= step < 12 else EXPERTS), y


def job(
    config: dict[str, Any], steps: int, told: bool = True, folder: str = "", save_at: int = 0, resume: bool = False
) -> tuple[np.ndarray, dict[str, float]]:
    """Stacked, under DeepSpeed; `told` says whether the module says how many experts it has.

    With a folder the run saves there at `save_at`, or resumes from there and trains on from that step.
    """
    import deepspeed

    model = Model(told)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    engine, *_ = ds_shampoo.initialize(model=model, model_parameters=model.parameters(), config=config)
    try:
        if resume:
            engine.load_checkpoint(folder)
        for step in range(save_at if resume else 0, steps):
            if folder and step == save_at and not resume:
                engine.save_checkpoint(folder)
            loss = engine(*(part.chunk(ranks)[rank] for part in batch(step)))
            engine.backward(loss)
            engine.step()
        parameters = list(engine.module.parameters())
        with contextlib.ExitStack() as stack:
            if config["zero_optimization"]["stage"] == 3:
                stack.enter_context(deepspeed.zero.GatheredParameters(parameters))
            end = torch.cat([p.detach().float().reshape(-1) for p in parameters]).numpy()
        return end, engine.basic_optimizer.metrics()
    finally:
        engine.destroy()


def alone(settings: dict[str, Any], steps: int) -> tuple[np.ndarray, dict[str, float]]:
    """Every expert a parameter of its own, in one process without DeepSpeed."""
    model = Model(separate=True)
    settings = {**settings, "fused_parts": {"mixture.gate_up_proj.?": 2}}  # as they are known to be in a stack
    optimizer = Shampoo(model.parameters(), model=model, **settings)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=False)
        model(*batch(step)).backward()
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).numpy(), optimizer.metrics()


def refusal(config: dict[str, Any]) -> str:
    try:
        job(config, 1)
    except ValueError as error:
        return str(error)
    return ""
