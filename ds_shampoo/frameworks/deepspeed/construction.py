"""A DeepSpeed engine while it is built: how the optimizer that it asks for finds it, and when it has that optimizer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from ds_shampoo.config import SettingsError

# DeepSpeed's parts that call the user's code: an optimizer that is made in there is the user's own.
_CALLERS_OF_USERS = (
    "deepspeed.runtime.activation_checkpointing",
    "deepspeed.runtime.pipe.module",
    "deepspeed.runtime.zero.partition_parameters",
)


def engine_being_built() -> Any | None:
    """The engine that is waiting for its optimizer, found in whichever of DeepSpeed's calls led here.

    Decorators, partials, tracers and callables of the user's may stand in between, and other engines beside it: only
    one that is to have an optimizer and has none yet is meant, the innermost first.

    Returns:
        None where no engine asked: for who calls `torch.optim.Shampoo` as any optimizer.

    Raises:
        SettingsError: if DeepSpeed asks, but its engine can't be found; a plain Shampoo would train wrongly there.
    """
    engine_type: Any = getattr(sys.modules.get("deepspeed"), "DeepSpeedEngine", None)
    if engine_type is None:
        return None
    innermost, seen = "", False
    for frame in _deepspeeds_frames():
        innermost = innermost or str(frame.f_globals["__name__"])
        engines = [value for value in frame.f_locals.values() if issubclass(type(value), engine_type)]
        seen = seen or bool(engines)
        waiting = next((engine for engine in engines if _waits_for_optimizer(engine)), None)
        if waiting is not None:
            return waiting
    builds = innermost == "deepspeed" or innermost.startswith("deepspeed.runtime")
    if builds and not seen and not innermost.startswith(_CALLERS_OF_USERS):
        raise SettingsError(
            f"DeepSpeed ({innermost}) builds torch.optim.Shampoo, but the engine that it is for was not found; this "
            "DeepSpeed builds optimizers in another way than those that were tried"
        )
    return None


def once_it_has_its_optimizer(engine: Any, action: Callable[[], None]) -> None:
    """Calls `action` as soon as an engine that is being built has put its optimizer in place, before its user has it.

    DeepSpeed has no hook for that. The schedule is what it sets up next; a release that does not is met at the first
    forward pass.
    """
    pending = [action]

    def act() -> None:
        while pending:
            pending.pop()()

    name = "_configure_lr_scheduler"
    deepspeeds = getattr(engine, name, None)
    if deepspeeds is None:
        engine.register_forward_pre_hook(lambda *_: act())
        return

    def configure_lr_scheduler(*positional: Any, **named: Any) -> Any:
        delattr(engine, name)
        act()
        return deepspeeds(*positional, **named)

    setattr(engine, name, configure_lr_scheduler)


def _deepspeeds_frames() -> Iterator[FrameType]:
    """DeepSpeed's own calls that led here, the innermost first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] == "deepspeed":
            yield frame
        frame = frame.f_back


def _waits_for_optimizer(engine: Any) -> bool:
    if getattr(engine, "optimizer", None) is not None or getattr(engine, "basic_optimizer", None) is not None:
        return False
    return getattr(engine, "client_optimizer", None) is not None or engine.optimizer_name() is not None
