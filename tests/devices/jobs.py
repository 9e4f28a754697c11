"""What the workers run: a DeepSpeed job that saves and loads, under a default dtype or device."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

import ds_shampoo
from tests.devices.defaults import default
from tests.distributed.jobs import build_model, fingerprint, flat, train


def under_default(
    config: dict[str, Any], which: torch.dtype | str | None, folder: str
) -> tuple[list[float], np.ndarray, str, float]:
    """A job of eight steps that is saved and taken up by a second engine after five of them.

    The default holds for building the engine, its steps, saving and loading; the model's own forward pass and loss
    would go by it too.

    Returns:
        The losses, the parameters at the end, a hash of the optimizer's state, and the number of blocks with roots.
    """
    with _engine(config, which) as engine:
        losses = train(engine, 0, 5)
        with default(which):
            engine.save_checkpoint(folder, tag="half")
    with _engine(config, which) as engine:
        with default(which):
            engine.load_checkpoint(folder, tag="half")
        losses += train(engine, 5, 3)
        optimizer = engine.basic_optimizer
        ready = optimizer.metrics()["preconditioned_blocks"]
        return losses, flat(engine.module), fingerprint(engine, optimizer), ready


@contextlib.contextmanager
def _engine(config: dict[str, Any], which: torch.dtype | str | None) -> Iterator[Any]:
    model = build_model()
    with default(which):
        engine, *_ = ds_shampoo.initialize(model=model, config=config)
    step = engine.step

    def under_it() -> None:
        with default(which):
            step()

    engine.step = under_it
    try:
        yield engine
    finally:
        engine.destroy()
