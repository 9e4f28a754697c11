"""`engine.save_checkpoint` and `load_checkpoint`, with the folder `shampoo/` beside DeepSpeed's own files."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ds_shampoo.frameworks.deepspeed import internals
from ds_shampoo.frameworks.deepspeed.accumulation import Accumulation
from ds_shampoo.frameworks.deepspeed.reading import load
from ds_shampoo.frameworks.deepspeed.writing import save
from ds_shampoo.optimizer import Shampoo


def attach(engine: Any, optimizer: Shampoo) -> None:
    """Has this engine's own `save_checkpoint` and `load_checkpoint` take Shampoo's blocks along.

    Both keep DeepSpeed's arguments and results. Only the one engine changes, and no file of DeepSpeed's.
    """
    accumulation = Accumulation(engine, optimizer)
    internals.tell_of_tied_layers(engine)
    internals.take_over_checkpoints(
        engine,
        saving=lambda deepspeeds: _saving(engine, optimizer, accumulation, deepspeeds),
        loading=lambda deepspeeds: _loading(engine, optimizer, accumulation, deepspeeds),
    )


def _saving(
    engine: Any, optimizer: Shampoo, accumulation: Accumulation, deepspeeds: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(deepspeeds)
    def save_checkpoint(*positional: Any, **named: Any) -> Any:
        call = _bound(deepspeeds, positional, named)
        write = functools.partial(_made, deepspeeds, call)
        return save(engine, optimizer, accumulation=accumulation, options=call.arguments, deepspeeds=write)

    return save_checkpoint


def _loading(
    engine: Any, optimizer: Shampoo, accumulation: Accumulation, deepspeeds: Callable[..., Any]
) -> Callable[..., Any]:
    @functools.wraps(deepspeeds)
    def load_checkpoint(*positional: Any, **named: Any) -> Any:
        call = _bound(deepspeeds, positional, named)
        under_way = accumulation.under_way()
        read = functools.partial(_made, deepspeeds, call)
        result = load(engine, optimizer, options=call.arguments, deepspeeds=read)
        accumulation.recount(under_way)
        return result

    return load_checkpoint


def _bound(function: Callable[..., Any], positional: Sequence[Any], named: Mapping[str, Any]) -> inspect.BoundArguments:
    """The arguments of a call by name, defaults filled in, to be read and changed before the call is made."""
    call = inspect.signature(function).bind(*positional, **named)
    call.apply_defaults()
    return call


def _made(function: Callable[..., Any], call: inspect.BoundArguments) -> Any:
    """The call's result, with the arguments as they are by now."""
    return function(*call.args, **call.kwargs)
