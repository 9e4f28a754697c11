"""`engine.save_checkpoint` and `load_checkpoint`, with the folder `shampoo/` beside DeepSpeed's own files."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ds_shampoo.frameworks.deepspeed.accumulation import Accumulation
from ds_shampoo.frameworks.deepspeed.reading import load
from ds_shampoo.frameworks.deepspeed.writing import save
from ds_shampoo.optimizer import Shampoo


def attach(engine: Any, optimizer: Shampoo) -> None:
    """Has this engine's own `save_checkpoint` and `load_checkpoint` take Shampoo's blocks along.

    Both keep DeepSpeed's arguments and results. Only the one engine changes, and no file of DeepSpeed's.
    """
    accumulation = Accumulation(engine, optimizer)
    engine.save_checkpoint = _saving(engine, optimizer, accumulation, engine.save_checkpoint)
    engine.load_checkpoint = _loading(engine, optimizer, accumulation, engine.load_checkpoint)


def _saving(
    engine: Any, optimizer: Shampoo, accumulation: Accumulation, deepspeeds: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(deepspeeds)
    def save_checkpoint(*positional: Any, **named: Any) -> Any:
        call = _bound(deepspeeds, positional, named)
        return save(engine, optimizer, accumulation, call.arguments, lambda: deepspeeds(*call.args, **call.kwargs))

    return save_checkpoint


def _loading(
    engine: Any, optimizer: Shampoo, accumulation: Accumulation, deepspeeds: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(deepspeeds)
    def load_checkpoint(*positional: Any, **named: Any) -> Any:
        call = _bound(deepspeeds, positional, named)
        under_way = accumulation.under_way()
        result = load(engine, optimizer, call.arguments, lambda: deepspeeds(*call.args, **call.kwargs))
        accumulation.recount(under_way)
        return result

    return load_checkpoint


def _bound(function: Callable[..., Any], positional: Sequence[Any], named: Mapping[str, Any]) -> inspect.BoundArguments:
    """The arguments of a call by name, defaults filled in, to be read and changed before the call is made."""
    call = inspect.signature(function).bind(*positional, **named)
    call.apply_defaults()
    return call
