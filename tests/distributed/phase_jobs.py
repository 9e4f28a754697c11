"""What workers run of jobs that change as they go: schedules of more than the learning rate, layers frozen in turn."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import nn

from ds_shampoo import Shampoo
from tests.distributed.jobs import batch, build_model, engine_of, flat, train


def scheduled(optimizer: Any, step: int) -> None:
    """What a trainer's schedule makes of every param group before a step: betas, weight decay and a key of its own."""
    for group in optimizer.param_groups:
        group["betas"] = (0.85 + 0.1 * math.cos(step / 4) ** 2, 0.95)
        group["weight_decay"] = 0.3 * math.sin(step / 5) ** 2
        group["lr"] = 3e-3 * (1 - step / 40)


def run(engine: Any, steps: range, until: int | None = None) -> None:
    """Trains steps, the schedule called before each that is below `until`."""
    for step in steps:
        if until is None or step < until:
            scheduled(engine.basic_optimizer, step)
        train(engine, step, 1)


def schedule_resumed(
    config: dict[str, Any], folder: str, save_at: int, steps: int, loading: dict[str, Any] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parameters after a run whose schedule stops at the save, after resuming it, and after rolling back to it."""
    with engine_of(config) as engine:
        run(engine, range(save_at), save_at)
        engine.save_checkpoint(folder, tag="half")
        run(engine, range(save_at, steps), save_at)
        straight = flat(engine.module)
        run(engine, range(steps, steps + 2))
        engine.load_checkpoint(folder, tag="half")
        run(engine, range(save_at, steps), save_at)
        back = flat(engine.module)
    with engine_of(loading or config) as engine:
        engine.load_checkpoint(folder, tag="half")
        run(engine, range(save_at, steps), save_at)
        return straight, flat(engine.module), back


def schedule_saved(config: dict[str, Any], folder: str, save_at: int, steps: int) -> np.ndarray:
    """As `schedule_resumed`, the straight run alone."""
    with engine_of(config) as engine:
        run(engine, range(save_at), save_at)
        engine.save_checkpoint(folder)
        run(engine, range(save_at, steps), save_at)
        return flat(engine.module)


def schedule_loaded(config: dict[str, Any], folder: str, save_at: int, steps: int) -> np.ndarray:
    with engine_of(config) as engine:
        engine.load_checkpoint(folder)
        run(engine, range(save_at, steps), save_at)
        return flat(engine.module)


def freeze(model: nn.Module, layers: set[int]) -> None:
    """Freezes these transformer layers, and trains the others."""
    for number, layer in enumerate(model.layers):  # type: ignore[arg-type]
        layer.requires_grad_(number not in layers)


def layer_groups(model: nn.Module) -> list[dict[str, Any]]:
    """A param group for each layer, and one for the rest."""
    layers = [list(layer.parameters()) for layer in model.layers]  # type: ignore[union-attr]
    own = {id(p) for layer in layers for p in layer}
    return [*({"params": layer} for layer in layers), {"params": [p for p in model.parameters() if id(p) not in own]}]


def phases(
    config: dict[str, Any], of_phases: list[set[int]], steps: int, grouped: bool, folder: str = "", save_at: int = -1
) -> tuple[np.ndarray, dict[str, float], bool]:
    """So many steps in each phase, in which other layers are frozen.

    Returns:
        The parameters, this rank's metrics, and whether every step was seen to be over.
    """
    with engine_of(config, layer_groups if grouped else None) as engine:
        seen = True
        for number, frozen in enumerate(of_phases):
            freeze(engine.module, frozen)
            for step in range(steps * number, steps * (number + 1)):
                if step == save_at:
                    engine.save_checkpoint(folder, tag="phase")
                train(engine, step, 1)
                seen &= engine.basic_optimizer.between_steps
        return flat(engine.module), engine.basic_optimizer.metrics(), seen


def phases_resumed(
    config: dict[str, Any], of_phases: list[set[int]], steps: int, grouped: bool, folder: str, save_at: int, first: int
) -> np.ndarray:
    """The rest of `phases` after its save, by an engine whose layers are frozen as in phase `first` as it loads."""
    with engine_of(config, layer_groups if grouped else None) as engine:
        freeze(engine.module, of_phases[first])
        engine.load_checkpoint(folder, tag="phase")
        for number, frozen in enumerate(of_phases):
            freeze(engine.module, frozen)
            for step in range(max(save_at, steps * number), steps * (number + 1)):
                train(engine, step, 1)
        return flat(engine.module)


def phases_alone(settings: dict[str, Any], of_phases: list[set[int]], steps: int) -> np.ndarray:
    """The reference of `phases`: one process without DeepSpeed."""
    model = build_model()
    optimizer = Shampoo(model.parameters(), model=model, **settings)
    for number, frozen in enumerate(of_phases):
        freeze(model, frozen)
        for step in range(steps * number, steps * (number + 1)):
            windows = batch(step)
            optimizer.zero_grad()
            model(windows[:, :-1], windows[:, 1:]).backward()
            optimizer.step()
    return flat(copy.deepcopy(model))


def frozen_from_the_start(config: dict[str, Any], folder: str) -> tuple[float, float]:
    """Blocks that are preconditioned while the first layer is frozen, from the construction on, and after it thawed."""
    import deepspeed  # noqa: F401

    import ds_shampoo

    model = build_model()
    freeze(model, {0})
    engine, *_ = ds_shampoo.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    try:
        train(engine, 0, 8)
        before = engine.basic_optimizer.metrics()["preconditioned_blocks"]
        freeze(model, set())
        train(engine, 8, 12)
        counts = torch.tensor([before, engine.basic_optimizer.metrics()["preconditioned_blocks"]])
        torch.distributed.all_reduce(counts)
        return float(counts[0]), float(counts[1])
    finally:
        engine.destroy()
