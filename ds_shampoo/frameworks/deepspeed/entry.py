"""The two ways in: `"type": "Shampoo"` in any DeepSpeed JSON, and `initialize`, which sets what that needs."""

from __future__ import annotations

import copy
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_shampoo.config import SettingsError, parse
from ds_shampoo.frameworks.deepspeed.construction import engine_being_built, once_it_has_its_optimizer
from ds_shampoo.frameworks.deepspeed.section import (
    TYPE,
    check_config,
    complete,
    config_of,
    names_shampoo,
    say_what_does_not_hold,
    say_whose_betas,
)
from ds_shampoo.optimizer import Shampoo


def register() -> None:
    """Makes `"optimizer": {"type": "Shampoo"}` known to DeepSpeed, which looks unknown types up in `torch.optim`.

    Raises:
        RuntimeError: if torch has come to ship an optimizer of that name.
    """
    present = getattr(torch.optim, TYPE, from_json)
    if present is not from_json:
        raise RuntimeError(f"torch.optim.{TYPE} exists already: {present!r}; ds_shampoo can't take its name")
    setattr(torch.optim, TYPE, from_json)


def from_json(params: Iterable[Tensor] | Iterable[dict[str, Any]], **settings: Any) -> Shampoo:
    """What DeepSpeed calls for the JSON's optimizer section.

    DeepSpeed passes a list of parameters and nothing else. Their names, the modules they belong to and the ZeRO
    settings are the engine's, which is found among DeepSpeed's calls that led here. Its own `save_checkpoint` and
    `load_checkpoint` take the blocks along from then on, and the layout is proved as soon as it has its optimizer.
    Called by anyone else this is plain `Shampoo(params, **settings)`.

    Raises:
        SettingsError: for a wrong setting, a DeepSpeed feature under which Shampoo can't run yet, or where DeepSpeed
            asks for an engine that can't be found.
    """
    engine = engine_being_built()
    if engine is None:
        return Shampoo(params, **settings)
    from ds_shampoo.frameworks.deepspeed.checkpoint import attach
    from ds_shampoo.frameworks.deepspeed.experts import adopt
    from ds_shampoo.frameworks.deepspeed.layouts import layout_for
    from ds_shampoo.frameworks.deepspeed.monitor import MonitorFeed
    from ds_shampoo.frameworks.deepspeed.support import (
        refuse_factors_of_tied_layers,
        refuse_norms_of_slices,
        refuse_unsupported,
    )

    _log_to_stdout()
    check_config(config_of(engine))
    say_what_does_not_hold(config_of(engine))
    say_whose_betas(settings)
    refuse_unsupported(engine)
    if hasattr(engine.mpu, "shampoo_prepare"):
        engine.mpu.shampoo_prepare(engine.module)
    groups = adopt(engine, params)
    if engine.zero_optimization():
        groups = _floats_first(groups)
    optimizer = Shampoo(groups, **settings, model=engine.module, layout=layout_for(engine))
    refuse_factors_of_tied_layers(engine, optimizer.param_groups)
    refuse_norms_of_slices(engine, optimizer.param_groups)
    optimizer.register_step_post_hook(MonitorFeed(engine))
    attach(engine, optimizer)
    once_it_has_its_optimizer(engine, optimizer.prepare)
    return optimizer


def initialize(
    args: Any = None, model: Any = None, optimizer: Any = None, config: Any = None, **others: Any
) -> tuple[Any, Any, Any, Any]:
    """`deepspeed.initialize`, with what Shampoo needs.

    Takes and returns what `deepspeed.initialize` does. Where the config's optimizer is Shampoo, its settings are
    checked before anything starts, and `zero_allow_untested_optimizer` and `zero_force_ds_cpu_optimizer` are set
    (in a copy); any other optimizer passes through untouched. A GPTPipeline sets what it needs itself.

    Raises:
        SettingsError: as `from_json`, and for a Shampoo object where the config should name it.
    """
    import deepspeed

    from ds_shampoo.frameworks.deepspeed.support import refuse_unknown_experts

    if isinstance(optimizer, Shampoo):
        raise SettingsError(
            "optimizer = a Shampoo object: under DeepSpeed name it in the config instead, "
            '"optimizer": {"type": "Shampoo", "params": {...}}'
        )
    if config is None:
        config = others.pop("config_params", None) or getattr(args, "deepspeed_config", None)
    if args is not None and getattr(args, "deepspeed_config", None) is not None:
        args = copy.copy(args)  # DeepSpeed takes a config from one place only, and Shampoo's is an edited copy
        args.deepspeed_config = None
    settings = _as_dict(config)
    if hasattr(model, "complete_settings"):
        model.complete_settings(settings)
    ours = optimizer is None and names_shampoo(settings)
    if ours:
        _log_to_stdout()
        check_config(settings)
        parse(settings["optimizer"].get("params") or {})
        complete(settings)
        if hasattr(others.get("mpu"), "shampoo_register"):
            others["mpu"].shampoo_register(model)
        refuse_unknown_experts(model)
    engine, *rest = deepspeed.initialize(args=args, model=model, optimizer=optimizer, config=settings, **others)
    if ours:
        engine.basic_optimizer.prepare()  # done already, but by a DeepSpeed of which no moment for it is known
    return engine, *rest


def _floats_first(members: Iterable[Any]) -> list[Any]:
    """Parameters or param groups with integers, as quantised weights are, behind what is trained.

    ZeRO takes the first parameter's dtype for everyone's, and would round all gradients to bytes.
    """
    return sorted(
        (
            {**member, "params": _floats_first(member["params"])}
            if isinstance(member, dict) and not isinstance(member["params"], Tensor)
            else member
            for member in members
        ),
        key=lambda member: isinstance(member, Tensor) and not member.is_floating_point(),
    )


def _as_dict(config: Any) -> dict[str, Any]:
    """A copy of a DeepSpeed config, given as a dict or as the path of a JSON file."""
    if isinstance(config, dict):
        return copy.deepcopy(config)
    if not isinstance(config, str | os.PathLike):
        raise SettingsError(f"config = {config!r}: must be a dict or the path of a DeepSpeed JSON file")
    import hjson
    from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys

    try:
        with Path(config).open() as file:
            return dict(hjson.load(file, object_pairs_hook=dict_raise_error_on_duplicate_keys))
    except OSError as error:
        raise SettingsError(f"config = {os.fspath(config)!r}: {error.strerror}") from error


def _log_to_stdout() -> None:
    """Shows the package's messages in a DeepSpeed job, whose launcher collects stdout, unless logging is set up."""
    logger = logging.getLogger("ds_shampoo")
    if logger.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] [ds_shampoo] %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
