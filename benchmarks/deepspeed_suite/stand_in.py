"""Puts Shampoo in Adam's place in a process that runs one of DeepSpeed's tests, and notes what becomes of it.

A test's ranks are processes that DeepSpeed forks or spawns by itself. What reaches them is the pickled test object;
`carry` makes it bring this module along, whose `take_place` wraps `deepspeed.initialize` there.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import os
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime.config_utils import dict_raise_error_on_duplicate_keys

import ds_shampoo

# What a JSON calls the optimizers that Shampoo stands in for, and the classes of those that tests make themselves.
NAMES = ("adam", "adamw")
CLASSES = (torch.optim.Adam, torch.optim.AdamW, FusedAdam, DeepSpeedCPUAdam)
KEPT = ("lr", "betas", "eps", "weight_decay")

# The tests' models are 10 wide and take a few steps: blocks of 8 are several to a matrix, on several owners, and roots
# come into force at once.
SETTINGS: dict[str, Any] = {"block_size": 8, "root_interval": 2, "root_delay": 1, "root_threads": 1}


class Notes:
    """The file to which all processes of a run append what they see, a JSON object a line."""

    def __init__(self, path: Path, optimizer: str) -> None:
        self.path = path
        self.optimizer = optimizer
        self.test = ""

    def write(self, event: str, **facts: Any) -> None:
        line = json.dumps({"test": self.test, "event": event, **facts}) + "\n"
        with self.path.open("ab", buffering=0) as file:  # a single write, so that lines of several processes do not mix
            file.write(line.encode())


class StandIn:
    """Wraps `deepspeed.initialize`, and remembers what it was."""

    def __init__(self, notes: Notes) -> None:
        self.notes = notes
        self.original: Callable[..., Any] = deepspeed.initialize
        self._inside = False

    def install(self) -> None:
        deepspeed.initialize = functools.wraps(self.original)(self)

    def __call__(self, *positional: Any, **named: Any) -> Any:
        arguments = dict(inspect.signature(self.original).bind(*positional, **named).arguments)
        config = None if self._inside else read_config(arguments)
        if config is None or not asks_for_adam(config, arguments.get("optimizer")):
            return self.original(**arguments)
        if self.notes.optimizer == "adam":
            return self.original(**with_torchs_adam(arguments, config))
        self.notes.write("asked")
        self._inside = True
        try:
            engine, *rest = ds_shampoo.initialize(**with_shampoo(arguments, config))
        except ds_shampoo.SettingsError as refusal:
            self.notes.write("refused", message=str(refusal))
            raise
        finally:
            self._inside = False
        self._watch(engine)
        return (engine, *rest)

    def _watch(self, engine: Any) -> None:
        """Notes an engine, and the first step that its Shampoo finishes."""
        optimizer = getattr(engine, "basic_optimizer", None)
        if not isinstance(optimizer, ds_shampoo.Shampoo):
            return
        self.notes.write("built", zero=int(engine.zero_optimization_stage()))
        stepped: list[bool] = []

        def step_done(*_: Any) -> None:
            if not stepped:
                stepped.append(True)
                self.notes.write("stepped")

        optimizer.register_step_post_hook(step_done)


def asks_for_adam(config: Mapping[str, Any], client: Any) -> bool:
    """Whether an engine is to have Adam: by an object that the test hands over, or else by its config."""
    if client is not None:
        return type(client) in CLASSES
    section = config.get("optimizer")
    kind = section.get("type") if isinstance(section, Mapping) else None
    return isinstance(kind, str) and kind.lower() in NAMES


def with_shampoo(arguments: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call that asks for Adam, as one that asks for Shampoo by its config."""
    client = arguments.get("optimizer")
    changed = dict(arguments, optimizer=None)
    if client is None:
        params = config["optimizer"].get("params") or {}
    else:
        params = client.defaults
        changed["model_parameters"] = [kept_of(group) for group in client.param_groups]
    settings = {key: value for key, value in params.items() if key in KEPT}
    config["optimizer"] = {"type": "Shampoo", "params": {**SETTINGS, **settings}}
    return with_config(changed, config)


def with_torchs_adam(arguments: Mapping[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call that asks for Adam, so that DeepSpeed takes torch's: its own wants minutes to build."""
    if arguments.get("optimizer") is not None:
        return dict(arguments)
    config["optimizer"]["params"] = {**(config["optimizer"].get("params") or {}), "torch_adam": True}
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    return with_config(dict(arguments), config)


def kept_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Of a param group of Adam's, what means the same to Shampoo."""
    return {key: value for key, value in group.items() if key in (*KEPT, "params", "name", "moe")}


def read_config(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """A copy of the config in a call's arguments; None where DeepSpeed is to find out what is wrong with it."""
    config: Any = arguments.get("config") or arguments.get("config_params")
    config = config or getattr(arguments.get("args"), "deepspeed_config", None)
    if isinstance(config, dict):
        return copy.deepcopy(config)
    try:
        return dict(json.loads(Path(config).read_text(), object_pairs_hook=dict_raise_error_on_duplicate_keys))
    except (OSError, TypeError, ValueError):
        return None


def with_config(arguments: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Puts a config into a call's arguments, in whatever place it stood."""
    arguments.pop("config_params", None)
    args = arguments.get("args")
    if getattr(args, "deepspeed_config", None) is not None:
        arguments["args"] = copy.copy(args)
        arguments["args"].deepspeed_config = None
    arguments["config"] = config
    return arguments


_here: StandIn | None = None


def take_place(path: str, optimizer: str, test: str) -> StandIn:
    """Makes this process one that runs a test with Shampoo; called again it goes on to another test."""
    global _here
    if _here is None:
        _here = StandIn(Notes(Path(path), optimizer))
        _here.install()
    _here.notes.test = test
    return _here


def carry(executor: type[Any], notes: Notes) -> None:
    """Makes the tests of `unit.common.DistributedExec` take this module along into the processes they start."""

    def reduce(self: Any) -> tuple[Any, ...]:
        return arrive, (str(notes.path), notes.optimizer, notes.test, type(self)), self.__dict__

    setattr(executor, "__reduce__", reduce)  # noqa: B010


def arrive(path: str, optimizer: str, test: str, kind: type[Any]) -> Any:
    """A test object in a process of its own: Shampoo takes its place there, and what a rank raises is noted.

    A rank that fails leaves others waiting for it, and DeepSpeed's pool tells of it only once all are done.
    """
    place = take_place(path, optimizer, test)
    found: Any = object.__new__(kind)
    run = found.run

    def run_and_note(**fixtures: Any) -> None:
        try:
            run(**fixtures)
        except Exception:
            place.notes.write("raised", rank=os.environ.get("RANK"), text=traceback.format_exc()[-3000:])
            raise

    found.run = run_and_note
    return found
