"""Mixtures of experts of Megatron-core under the real engine, with the same weights at any expert-parallel size."""

from __future__ import annotations

import re
import zlib
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.megatron_models import groups, jobs
from tests.megatron_models.jobs import Run, engine_of, named, train

EXPERTS = 4


def build(expert_parallel: int, tensor_parallel: int = 1, **more: Any) -> nn.Module:
    """A GPT of two layers with four experts each; `more` goes to Megatron's settings."""
    model = jobs.build(
        tensor_parallel,
        experts=EXPERTS,
        expert_parallel=expert_parallel,
        sequence_parallel=tensor_parallel > 1,
        **more,
    )
    seed(model)
    return model


def seed(model: nn.Module) -> None:
    """Gives every matrix weights that depend on its name in the whole model alone."""
    from ds_shampoo.megatron import mpu

    for name, parameter in model.named_parameters():
        if parameter.dim() != 2:
            continue
        sections = mpu.shampoo_sections(model, name, parameter)
        extents = [[a + n for a, n in zip(s.origin, s.shape, strict=True)] for s in sections or ()]
        shape = [max(ends) for ends in zip(*extents, strict=True)] or list(parameter.shape)
        generator = torch.Generator().manual_seed(zlib.crc32(globally(name).encode()))
        whole = torch.randn(shape, generator=generator) * 0.1
        with torch.no_grad():
            if sections is None:
                parameter.copy_(whole)
            for s in sections or ():
                if s.starts is not None:
                    (a, b), (i, j), (rows, columns) = s.starts, s.origin, s.shape
                    parameter[a : a + rows, b : b + columns] = whole[i : i + rows, j : j + columns]


def globally(name: str) -> str:
    """An expert's parameter named by the expert's number over all ranks."""
    from megatron.core import parallel_state

    first = parallel_state.get_expert_model_parallel_rank() * EXPERTS
    first //= parallel_state.get_expert_model_parallel_world_size()
    return re.sub(r"(?<=local_experts\.)\d+", lambda found: str(int(found[0]) + first), name)


def job(
    config: dict[str, Any],
    steps: int,
    expert_parallel: int,
    tensor_parallel: int = 1,
    folder: str = "",
    save_at: int = 0,
    resume: bool = False,
    load: dict[str, Any] | None = None,
    **more: Any,
) -> Run:
    """As `jobs.job`, of experts; with `load`, arguments of `load_checkpoint`, nothing is trained after it."""
    from megatron.core import parallel_state

    model = build(expert_parallel, tensor_parallel, **more)
    with engine_of(model, config) as engine:
        start = by_name(engine.module)
        if resume:
            engine.load_checkpoint(folder, **(load or {}))
        losses = [] if resume or not folder else train(engine, "gpt", 0, save_at)
        if folder and not resume:
            engine.save_checkpoint(folder)
        if load is None:
            losses += train(engine, "gpt", save_at if folder else 0, steps)
        optimizer = engine.basic_optimizer
        blocks = [owned for group in optimizer._groups.values() for owned in group.owned_blocks]
        ready = [str(owned.block) for owned in blocks if owned.stack.ready[owned.slot]]
        rank = parallel_state.get_tensor_model_parallel_rank()
        return Run(losses, start, by_name(engine.module), optimizer.metrics(), ready, rank, 0)


def by_name(model: nn.Module) -> dict[str, np.ndarray]:
    return {globally(name): value for name, value in named(model).items()}


def refused(config: dict[str, Any], expert_parallel: int, *arguments: Any, **more: Any) -> str:
    """The message with which a job is refused."""
    try:
        job(config, 2, expert_parallel, *arguments, **more)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


def unregistered(config: dict[str, Any]) -> str:
    """The message for experts of which nobody told DeepSpeed."""
    import ds_shampoo

    model = build(2)
    try:
        ds_shampoo.initialize(model=model, model_parameters=model.parameters(), config=config)
    except ValueError as error:
        return str(error)
    return ""


def registered(config: dict[str, Any], steps: int) -> Run:
    """The job through DeepSpeed's own `initialize`, with matrices and vectors in param groups of their own."""
    import deepspeed

    import ds_shampoo
    from ds_shampoo.megatron import mpu, register_experts

    ds_shampoo.register()
    model = build(2)
    assert register_experts(model) == 2 * 2 * EXPERTS // 2
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) == wide]} for wide in (True, False)]
    config = {**config, "zero_allow_untested_optimizer": True}
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config, mpu=mpu)
    try:
        start = by_name(engine.module)
        losses = train(engine, "gpt", 0, steps)
        return Run(losses, start, by_name(engine.module), engine.basic_optimizer.metrics(), ["-"], 0, 0)
    finally:
        engine.destroy()
        deepspeed.utils.groups.mpu = None


def mismatched() -> str:
    """The message for experts that are sliced otherwise than the rest."""
    from ds_shampoo.megatron import register_experts

    model = build(1, 2)
    groups.initialize(tensor_model_parallel_size=2, expert_tensor_parallel_size=1)
    try:
        register_experts(model)
    except ValueError as error:
        return str(error)
    return ""
