"""A DeepSpeed engine while it is built: which one asks for an optimizer, and what is done with a Shampoo that it gets.

DeepSpeed has no hook for that. Its engines get their optimizer in one method, whichever way it comes in: named by the
config, as an object, or out of a callable. That method is wrapped, on the class, before the first engine is built.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any, NamedTuple

from torch.optim import Optimizer

from ds_shampoo.config import SettingsError
from ds_shampoo.frameworks.deepspeed import internals
from ds_shampoo.frameworks.deepspeed.imports import when_imported
from ds_shampoo.frameworks.deepspeed.internals import DEEPSPEED
from ds_shampoo.frameworks.deepspeed.section import names_shampoo
from ds_shampoo.optimizer import Shampoo
from ds_shampoo.parameters.unbound import to_be_bound

logger = logging.getLogger("ds_shampoo")


class _Building(NamedTuple):
    """An engine that is getting its optimizer, and whether it is the config that says which."""

    engine: Any
    by_config: bool


# What was put in its place.
_ours: weakref.WeakSet[Callable[..., None]] = weakref.WeakSet()

# The innermost one: an engine may be built while another is.
_building: ContextVar[_Building | None] = ContextVar("building", default=None)


def watch_engines() -> None:
    """Has every engine take on the Shampoo that it is given, from now on; DeepSpeed is not imported for that."""
    when_imported(internals.ENGINE_MODULE, _wrap)


def engine_being_built() -> Any | None:
    """The engine that is getting its optimizer now; None where none is."""
    building = _building.get()
    return building.engine if building is not None else None


def engine_that_names_its_optimizer() -> Any | None:
    """The engine that builds what its config names now, and has nothing yet; None where none does."""
    building = _building.get()
    if building is None or not building.by_config or internals.inner_optimizer(building.engine) is not None:
        return None
    return building.engine


def _wrap(module: ModuleType) -> None:
    """Wraps the method once; where it is not what it was, engines refuse Shampoo."""
    engine_type = internals.engine_type(module)
    if engine_type is None:
        logger.warning("%s", _moved(internals.ENGINE))
        return
    method, init = internals.configuring_method(engine_type), engine_type.__init__
    if method in _ours or init in _ours:
        return
    if method is not None:
        internals.replace_configuring_method(engine_type, configuring := _configuring(method))
        _ours.add(configuring)
    else:
        engine_type.__init__ = refusing = _refusing(init, _moved(internals.CONFIGURING))
        _ours.add(refusing)


def _configuring(deepspeeds: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(deepspeeds)
    def configure_optimizer(self: Any, client_optimizer: Any, model_parameters: Any) -> None:
        from ds_shampoo.frameworks.deepspeed import binding

        trained = client_optimizer.param_groups if isinstance(client_optimizer, Optimizer) else model_parameters
        made_for_them = binding.made_for(trained)
        if isinstance(client_optimizer, Shampoo):
            binding.take_on_object(self, client_optimizer)
        elif callable(client_optimizer) and not isinstance(client_optimizer, Optimizer):
            client_optimizer = _taken_on(self, client_optimizer)
        token = _building.set(_Building(self, by_config=client_optimizer is None))
        try:
            deepspeeds(self, client_optimizer, model_parameters)
        finally:
            _building.reset(token)
        binding.finish(self, made_for_them)

    return configure_optimizer


def _taken_on(engine: Any, make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The user's callable; should it give a Shampoo, it is the engine's."""

    def made(model_parameters: Any) -> Any:
        from ds_shampoo.frameworks.deepspeed import binding

        with to_be_bound():
            optimizer = make(model_parameters)
        if isinstance(optimizer, Shampoo):
            binding.take_on_object(engine, optimizer)
        return optimizer

    return made


def _refusing(init: Callable[..., None], reason: str) -> Callable[..., None]:
    """The constructor of an engine that can't take a Shampoo on, and says so."""

    @functools.wraps(init)
    def refuse(self: Any, *positional: Any, **named: Any) -> None:
        config = named.get("config")
        if any(isinstance(argument, Shampoo) for argument in (*positional, *named.values())) or (
            isinstance(config, dict) and named.get("optimizer") is None and names_shampoo(config)
        ):
            raise SettingsError(reason)
        init(self, *positional, **named)
        if isinstance(internals.inner_optimizer(self), Shampoo):
            raise SettingsError(reason)

    return refuse


def _moved(name: str) -> str:
    return (
        f"this DeepSpeed has no {name}, by which Shampoo gets to know its engine: use a release that ds_shampoo was "
        f"tested with ({DEEPSPEED.tested_version})"
    )
