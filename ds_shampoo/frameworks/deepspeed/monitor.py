"""Shampoo's metrics in DeepSpeed's monitor: TensorBoard, WandB, Comet or CSV, as the JSON says."""

from __future__ import annotations

import weakref
from typing import Any

from ds_shampoo.frameworks.deepspeed import internals


class MonitorFeed:
    """A step hook that writes `Shampoo.metrics()` of rank 0 as `Train/Shampoo/<name>` over samples, as DeepSpeed does.

    Nothing waits for the device: times are those of the newest step that it is through with.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = weakref.ref(engine)

    def __call__(self, optimizer: Any, *_: Any) -> None:
        engine = self._engine()
        if engine is None or engine.optimizer is None or not optimizer.between_steps:
            return
        monitor = internals.monitor(engine)
        if monitor.enabled and engine.global_rank == 0:
            # DeepSpeed counts this step's samples afterwards.
            samples = internals.samples(engine) + engine.train_batch_size()
            monitor.write_events(
                [(f"Train/Shampoo/{name}", value, samples) for name, value in optimizer.metrics().items()]
            )
