"""What the workers run: attention and gated units with fused matrices under the real DeepSpeed engine, or separate."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ds_shampoo
from ds_shampoo import Shampoo
from ds_shampoo.state.files import CheckpointError

WIDTH, HEADS, HEAD, GROUPS, HIDDEN, BATCH, CONTEXT = 16, 4, 4, 2, 12, 8, 6


class Conv1D(nn.Module):
    """Hugging Face's: [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * nx**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Columns(nn.Module):
    """GPT-2's queries, keys and values, one after another in columns."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, HEAD
        self.c_attn = Conv1D(3 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.c_attn(x).split(WIDTH, dim=-1)

    def parts(self) -> list[Tensor]:
        return list(self.c_attn.weight.detach().mT.split(WIDTH))


class Groups(nn.Module):
    """Falcon's: the queries, keys and values of each group together, in rows."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.config = HEAD, SimpleNamespace(num_attention_heads=HEADS, num_kv_heads=GROUPS)
        self.query_key_value = nn.Linear(WIDTH, (HEADS + 2 * GROUPS) * HEAD, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.query_key_value(x).split((HEADS // GROUPS * HEAD, HEAD, HEAD) * GROUPS, dim=-1)

    def parts(self) -> list[Tensor]:
        return list(self.query_key_value.weight.detach().split((HEADS // GROUPS * HEAD, HEAD, HEAD) * GROUPS))


class Gated(nn.Module):
    """Phi-3's gated unit."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(WIDTH, 2 * HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        y: Tensor = self.down_proj(F.silu(gate) * up)
        return y


class Separate(nn.Module):
    """A parameter for each part of a fused matrix, [out, in]."""

    def __init__(self, parts: list[Tensor]) -> None:
        super().__init__()
        self.parts = nn.ParameterList([nn.Parameter(part.clone().contiguous()) for part in parts])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.linear(x, part) for part in self.parts)


class Model(nn.Module):
    """Both kinds of attention and a gated unit, one after another."""

    def __init__(self, separate: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.columns, self.groups, self.gated = Columns(), Groups(), Gated()
        self.separate = separate
        if separate:
            gate, up = self.gated.gate_up_proj.weight.detach().chunk(2)
            down = self.gated.down_proj.weight.detach().clone()
            self.columns, self.groups = (Separate(each.parts()) for each in (self.columns, self.groups))  # type: ignore[assignment]
            self.gated = nn.ModuleDict({"gate_up": Separate([gate, up]), "down": Separate([down])})  # type: ignore[assignment]

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q, k, v = self.columns(x)
        x = x + _attended(q, k, v, HEADS)
        parts = self.groups(x)
        q, k, v = (torch.cat(parts[number::3], dim=-1) for number in range(3))
        x = x + _attended(
            q, *(each.unflatten(-1, (GROUPS, HEAD)).repeat_interleave(2, -2).flatten(-2) for each in (k, v)), HEADS
        )
        if self.separate:
            gate, up = self.gated["gate_up"](x)  # type: ignore[index]
            (x,) = self.gated["down"](F.silu(gate) * up)  # type: ignore[index]
        else:
            x = self.gated(x)
        return F.mse_loss(x, y)

    def flat(self) -> Tensor:
        """All parts in one order."""
        if self.separate:
            return torch.cat([p.detach().reshape(-1) for p in self.parameters()])
        gated = [*self.gated.gate_up_proj.weight.detach().chunk(2), self.gated.down_proj.weight.detach()]
        parts = [*self.columns.parts(), *self.groups.parts(), *gated]
        return torch.cat([part.reshape(-1).float() for part in parts])


def _attended(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    q, k, v = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, CONTEXT, WIDTH, generator=generator)
    return x, torch.tanh(x.cumsum(1))


def job(
    config: dict[str, Any], steps: int, folder: str = "", save_at: int = 0, resume: bool = False
) -> tuple[np.ndarray, dict[str, float], str]:
    """Fused, under DeepSpeed: the end, what was counted, and the table.

    With a folder the run saves there at `save_at`, or resumes from there and trains on from that step.
    """
    import deepspeed

    model = Model()
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    engine, *_ = ds_shampoo.initialize(model=model, model_parameters=model.parameters(), config=config)
    try:
        if resume:
            engine.load_checkpoint(folder)
        started = engine.basic_optimizer.metrics()["preconditioned_blocks"]
        for step in range(save_at if resume else 0, steps):
            if folder and step == save_at and not resume:
                engine.save_checkpoint(folder)
            loss = engine(*(part.chunk(ranks)[rank] for part in batch(step)))
            engine.backward(loss)
            engine.step()
        with contextlib.ExitStack() as stack:
            if config["zero_optimization"]["stage"] == 3:
                stack.enter_context(deepspeed.zero.GatheredParameters(list(engine.module.parameters())))
            end = model.flat().numpy()
        metrics = {**engine.basic_optimizer.metrics(), "started": started}
        return end, metrics, engine.basic_optimizer.describe()
    finally:
        engine.destroy()


def alone(settings: dict[str, Any], steps: int) -> tuple[np.ndarray, dict[str, float]]:
    """Every part a parameter of its own, in one process without DeepSpeed."""
    model = Model(separate=True)
    optimizer = Shampoo(model.parameters(), model=model, **settings)
    for step in range(steps):
        optimizer.zero_grad(set_to_none=False)
        model(*batch(step)).backward()
        optimizer.step()
    return model.flat().numpy(), optimizer.metrics()


def refusal(config: dict[str, Any], folder: str = "", save_at: int = 0) -> str:
    try:
        job(config, save_at + 1, folder, save_at, resume=bool(folder))
    except (ValueError, CheckpointError) as error:
        return str(error)
    return ""
