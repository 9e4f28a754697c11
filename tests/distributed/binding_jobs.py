"""The job of `jobs.py` with Shampoo named by the config, as an object, and out of a callable, by DeepSpeed's entry."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import ds_shampoo
from ds_shampoo import Shampoo
from tests.distributed import jobs
from tests.distributed.jobs import build_model, fingerprint, flat, train

Groups = Callable[[nn.Module], Any]

# The JSON's keys that DeepSpeed itself asks for.
NEEDED = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}


@dataclass
class Outcome:
    """What a way in has to bring about as the others do."""

    losses: list[float]
    end: np.ndarray
    state: str
    names: list[str]
    layout: str
    attached: bool
    rates: list[float]


def warm_up(step: int) -> float:
    return min(1.0, (step + 1) / 4)


def generated(model: nn.Module) -> list[dict[str, Any]]:
    """A param group that can be looked through once only."""
    return [{"params": model.parameters()}]


class Kept:
    """The param groups of an object, to be found unchanged: the list, its dicts, and their order.

    Empty ones aside, which DeepSpeed takes out of every optimizer.
    """

    def __init__(self, optimizer: Shampoo) -> None:
        self._optimizer, self._groups = optimizer, optimizer.param_groups
        self._dicts = [group for group in optimizer.param_groups if group["params"]]
        self._settings = [{k: v for k, v in group.items() if k != "params"} for group in self._dicts]

    def check(self) -> None:
        groups = self._optimizer.param_groups
        assert groups is self._groups
        assert all(now is before for now, before in zip(groups, self._dicts, strict=True))
        assert [{k: v for k, v in group.items() if k != "params"} for group in groups] == self._settings


@contextlib.contextmanager
def engine_by(
    way: str,
    config: dict[str, Any],
    groups: Groups | None = None,
    scheduled: bool = False,
    zero_init: bool = False,
    ours: bool = False,
) -> Iterator[Any]:
    """An engine whose Shampoo comes in by the `way`: "config", "object", "pairs", "callable" or "partial".

    With `scheduled` a LambdaLR warms up: on the object, and else by DeepSpeed's callable. `ours` is for
    `ds_shampoo.initialize`, without the keys that DeepSpeed asks for.
    """
    import deepspeed

    config = {**copy.deepcopy(config), **({} if ours else NEEDED)}
    settings = config["optimizer"]["params"]
    model = jobs.hidden_model(config) if zero_init else build_model()
    members = groups(model) if groups else None
    sent: dict[str, Any] = {"model_parameters": members}
    if scheduled:
        sent["lr_scheduler"] = lambda optimizer: LambdaLR(optimizer, warm_up)
    if way != "config":
        del config["optimizer"]
    kept = None
    if way in ("object", "pairs"):
        if members is None:
            members = model.named_parameters() if way == "pairs" else model.parameters()
        sent = {"optimizer": Shampoo(members, **settings)}
        if scheduled:
            sent["lr_scheduler"] = LambdaLR(sent["optimizer"], warm_up)
        kept = Kept(sent["optimizer"])
    elif way == "callable":
        sent["optimizer"] = lambda params: Shampoo(params, **settings)
    elif way == "partial":
        sent["optimizer"] = functools.partial(torch.optim.Shampoo, **settings)  # type: ignore[attr-defined]
    initialize = ds_shampoo.initialize if ours else deepspeed.initialize
    engine, *_ = initialize(model=model, config=config, **sent)
    if kept is not None:
        kept.check()
    try:
        yield engine
    finally:
        engine.destroy()


def outcome(engine: Any, first: int, steps: int) -> Outcome:
    """Trains on, and takes down what is compared."""
    optimizer = engine.basic_optimizer
    losses = train(engine, first, steps)
    return Outcome(
        losses,
        flat(engine.module),
        fingerprint(engine, optimizer),
        [name for subgroup in optimizer.subgroups() for name in subgroup.sharded.table.blocked],
        type(optimizer.layout).__name__,
        "save_checkpoint" in vars(engine),
        [group["lr"] for group in optimizer.param_groups],
    )


def by_ways(ways: list[str], config: dict[str, Any], steps: int, **how: Any) -> list[Outcome]:
    """The job from its beginning, once for each way in."""
    found = []
    for way in ways:
        with engine_by(way, config, **how) as engine:
            found.append(outcome(engine, 0, steps))
    return found


def resumed_by(ways: list[str], config: dict[str, Any], folder: str, save_at: int, steps: int) -> list[Outcome]:
    """What goes on from a checkpoint of the first way's job: itself, and each way's new engine."""
    how: dict[str, Any] = {"groups": jobs.decay_groups, "scheduled": True}
    with engine_by(ways[0], config, **how) as engine:
        train(engine, 0, save_at)
        engine.save_checkpoint(folder)
        found = [outcome(engine, save_at, steps - save_at)]
    for way in ways:
        with engine_by(way, config, **how) as engine:
            engine.load_checkpoint(folder)
            found.append(outcome(engine, save_at, steps - save_at))
    return found


class Listener(logging.Handler):
    """What the package warns of meanwhile."""

    def __enter__(self) -> list[str]:
        self.said: list[str] = []
        logging.getLogger("ds_shampoo").addHandler(self)
        return self.said

    def __exit__(self, *_: object) -> None:
        logging.getLogger("ds_shampoo").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.said.append(record.getMessage())


def warned(config: dict[str, Any], kind: str) -> tuple[list[str], str]:
    """What is warned of where an object is not the engine's optimizer, or the config says something else beside it.

    Returns:
        The warnings, and which optimizer the engine has.
    """
    import deepspeed

    model = build_model()
    config = {**copy.deepcopy(config), **NEEDED}
    shampoo = Shampoo(model.parameters(), model=model)
    if kind != "partly":
        config["optimizer"] = {"type": "Shampoo" if kind == "named" else "SGD", "params": {"lr": 0.1}}
    sent: dict[str, Any] = {}
    if kind == "partly":  # one of the layers is the user's own
        shampoo = Shampoo(model.layers[0].parameters())
        rest = [p for name, p in model.named_parameters() if not name.startswith("layers.0.")]
        sent["optimizer"] = torch.optim.SGD(rest, lr=0.1)
        del config["optimizer"]
    elif kind == "beside":
        sent["optimizer"] = shampoo
    elif kind == "callable beside":
        sent["optimizer"] = lambda params: shampoo
    elif kind == "named":
        sent["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
        del shampoo
    elif kind == "taken":  # what Accelerate does under offload
        sent["optimizer"] = torch.optim.AdamW(shampoo.param_groups, lr=0.1)
        del config["optimizer"]
    with Listener() as said:
        engine, *_ = deepspeed.initialize(model=model, config=config, **sent)
        name = type(engine.basic_optimizer).__name__
        engine.destroy()
    return said, name


def message(job: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    """What a job is refused with."""
    try:
        job(*arguments, **named)
    except ValueError as error:
        return str(error)
    return ""


def added_between_steps(config: dict[str, Any]) -> tuple[bool, list[str], str, str]:
    """A param group comes late, and with it a wrong setting for one step."""
    import deepspeed

    model = build_model()
    config = {**copy.deepcopy(config), **NEEDED}
    del config["optimizer"]
    (first, *others) = model.parameters()
    shampoo = Shampoo(others, **jobs.SHAMPOO)
    engine, *_ = deepspeed.initialize(model=model, optimizer=shampoo, config=config)
    with Listener() as said:
        train(engine, 0, 2)
        shampoo.add_param_group({"params": [first]})
        between, betas, outcomes = shampoo.between_steps, shampoo.param_groups[0]["betas"], []
        for wrong in (True, False):
            shampoo.param_groups[0]["betas"] = (2.0, 0.9) if wrong else betas
            try:
                train(engine, 2, 1)
            except Exception as error:
                outcomes.append(str(error))
            else:
                outcomes.append("")
    return between, [line for line in said if "began before" in line], outcomes[0], outcomes[1]


def refused_by_json(config: dict[str, Any]) -> str:
    """What the config's optimizer says of a parameter that can't be trained."""
    import deepspeed

    model = build_model()
    model.inner = nn.Module()
    model.inner.odd = nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64))
    try:
        deepspeed.initialize(model=model, config={**copy.deepcopy(config), **NEEDED})
    except ValueError as error:
        return str(error)
    return ""


def refused(config: dict[str, Any], kind: str) -> str:
    """What an object is refused with that is not as it was made."""
    import deepspeed

    model = build_model()
    settings, config = config["optimizer"]["params"], {**copy.deepcopy(config), **NEEDED}
    del config["optimizer"]
    shampoo = Shampoo(model.parameters(), **settings)
    if kind in ("stepped", "loaded"):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        shampoo.step()
    if kind == "loaded":
        state = shampoo.state_dict()
        shampoo = Shampoo(model.parameters(), **settings)
        shampoo.load_state_dict(state)
    if kind == "pattern":
        shampoo = Shampoo(model.named_parameters(prefix="mine"), roles={"mine.*": "weight"})
    if kind == "replaced":
        shampoo.param_groups[0]["params"] = [p.detach().clone() for p in model.parameters()]
    engines = []
    if kind == "another's":
        engines.append(deepspeed.initialize(model=model, optimizer=shampoo, config=config)[0])
    try:
        engines.append(deepspeed.initialize(model=model, optimizer=shampoo, config=config)[0])
    except ValueError as error:
        return str(error)
    finally:
        for engine in engines:
            engine.destroy()
    return ""


def keys_named(stage: int) -> list[str]:
    """What DeepSpeed and the package say where a key is missing, or a callable gives another optimizer.

    That is an object without any key, one under offload with the first key only, and a callable that gives AdamW
    under offload, to `ds_shampoo.initialize`.
    """
    import deepspeed

    offload = {"offload_optimizer": {"device": "cpu"}}
    found = []
    for initialize, config, adam in (
        (deepspeed.initialize, jobs.engine_config({}, stage, 1), False),
        (
            deepspeed.initialize,
            jobs.engine_config({}, stage, 1, zero=dict(offload), zero_allow_untested_optimizer=True),
            False,
        ),
        (ds_shampoo.initialize, jobs.engine_config({}, stage, 1, zero=dict(offload)), True),
    ):
        del config["optimizer"]
        model = build_model()
        optimizer: Any = torch.optim.AdamW if adam else Shampoo(model.parameters())
        try:
            initialize(model=model, optimizer=optimizer, config=config)[0].destroy()
            found.append("")
        except Exception as error:
            found.append(str(error))
    return found


def named_otherwise(stage: int) -> str:
    """What an engine says whose config names a function of the user's that makes a Shampoo."""
    import deepspeed

    torch.optim.Mine = lambda params, **settings: Shampoo(params, **settings)  # type: ignore[attr-defined]
    config = {**jobs.engine_config({"lr": 0.1}, stage, 1), **NEEDED}
    config["optimizer"]["type"] = "Mine"
    try:
        deepspeed.initialize(model=build_model(), config=config)[0].destroy()
        return ""
    except (ValueError, RuntimeError) as error:
        return str(error)
    finally:
        del torch.optim.Mine  # type: ignore[attr-defined]
