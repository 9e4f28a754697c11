"""The ways in: `"type": "Shampoo"` in any DeepSpeed JSON, objects, callables, and `initialize`, which completes it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ds_shampoo.config import SettingsError, parse
from ds_shampoo.frameworks import protocols
from ds_shampoo.frameworks.deepspeed.construction import (
    engine_being_built,
    engine_that_names_its_optimizer,
    watch_engines,
)
from ds_shampoo.frameworks.deepspeed.section import (
    TYPE,
    check_config,
    complete,
    complete_config_of,
    config_of,
    distinct_keys,
    names_shampoo,
    say_what_does_not_hold,
    say_whose_betas,
)
from ds_shampoo.optimizer import Shampoo
from ds_shampoo.parameters.unbound import to_be_bound


def register() -> None:
    """Makes `"optimizer": {"type": "Shampoo"}` known to DeepSpeed, which looks unknown types up in `torch.optim`.

    Its engines take on Shampoo objects from then on, too, whether it has been imported already or will be.

    Raises:
        RuntimeError: if torch has come to ship an optimizer of that name.
    """
    present = getattr(torch.optim, TYPE, from_json)
    if present is not from_json:
        raise RuntimeError(f"torch.optim.{TYPE} exists already: {present!r}; ds_shampoo can't take its name")
    setattr(torch.optim, TYPE, from_json)
    watch_engines()


def from_json(params: Iterable[Tensor] | Iterable[dict[str, Any]], **settings: Any) -> Shampoo:
    """What DeepSpeed calls for the JSON's optimizer section.

    DeepSpeed passes a list of parameters and nothing else; the engine that is being built takes the optimizer on
    (`binding.take_on`). Called by anyone else this is plain `Shampoo(params, **settings)`.

    Raises:
        SettingsError: for a wrong setting, or a DeepSpeed feature under which Shampoo can't run yet.
    """
    engine = engine_that_names_its_optimizer()
    if engine is None:
        return Shampoo(params, **settings)
    from ds_shampoo.frameworks.deepspeed import binding
    from ds_shampoo.frameworks.deepspeed.experts import adopt

    binding.log_to_stdout()
    check_config(config_of(engine))
    say_what_does_not_hold(config_of(engine))
    say_whose_betas(settings)
    binding.prepare(engine)
    with to_be_bound():
        optimizer = Shampoo(adopt(engine, params), **settings, model=engine.module)  # for names in what it raises
    binding.take_on(engine, optimizer)
    return optimizer


def initialize(
    args: Any = None, model: Any = None, optimizer: Any = None, config: Any = None, **others: Any
) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize`, with what Shampoo needs.

    Takes and returns what `deepspeed.initialize` does. Where the config's optimizer is Shampoo, or `optimizer` is a
    Shampoo object, its settings are checked before anything starts, and `zero_allow_untested_optimizer` and
    `zero_force_ds_cpu_optimizer` are set (in a copy). Where `optimizer` is a callable they hold for the engine if it
    gives a Shampoo. Any other optimizer passes through untouched; for a callable, which may give anything,
    experts are made known to DeepSpeed, or refused, all the same. A GPTPipeline sets what it needs itself.

    Raises:
        SettingsError: as `from_json`, and as `Shampoo.bind` for an object or what a callable gives.
    """
    import deepspeed

    from ds_shampoo.frameworks.deepspeed.binding import log_to_stdout
    from ds_shampoo.frameworks.deepspeed.support import refuse_unknown_experts

    if config is None:
        config = others.pop("config_params", None) or getattr(args, "deepspeed_config", None)
    if args is not None and getattr(args, "deepspeed_config", None) is not None:
        args = copy.copy(args)  # DeepSpeed takes a config from one place only, and Shampoo's is an edited copy
        args.deepspeed_config = None
    settings = _as_dict(config)
    if protocols.completes_settings(model):
        model.complete_settings(settings)
    by_config = optimizer is None and names_shampoo(settings)
    by_callable = callable(optimizer) and not isinstance(optimizer, Optimizer)
    if by_config:
        log_to_stdout()
        check_config(settings)
        parse(settings["optimizer"].get("params") or {})
    if by_config or isinstance(optimizer, Shampoo):
        complete(settings)
    if by_callable:
        optimizer = _completing(optimizer)
    if by_config or by_callable or isinstance(optimizer, Shampoo):
        if protocols.registers_model(others.get("mpu")):
            others["mpu"].shampoo_register(model)
        refuse_unknown_experts(model)
    found: tuple[Any, Any, Any, Any] = deepspeed.initialize(
        args=args, model=model, optimizer=optimizer, config=settings, **others
    )
    return found


def _completing(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A user's callable; should it give a Shampoo, its engine's config is completed for it."""

    def made(parameters: Any) -> Any:
        optimizer = make(parameters)
        if isinstance(optimizer, Shampoo):
            complete_config_of(engine_being_built())
        return optimizer

    return made


def _as_dict(config: Any) -> dict[str, Any]:
    """A copy of a DeepSpeed config, given as a dict or as the path of a JSON file."""
    if isinstance(config, dict):
        return copy.deepcopy(config)
    if not isinstance(config, str | os.PathLike):
        raise SettingsError(f"config = {config!r}: must be a dict or the path of a DeepSpeed JSON file")
    import hjson

    try:
        with Path(config).open() as file:
            return dict(hjson.load(file, object_pairs_hook=distinct_keys))
    except OSError as error:
        raise SettingsError(f"config = {os.fspath(config)!r}: {error.strerror}") from error
