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
        with self.path.open("a") as file:  # one write below a page: lines of several processes do not mix
            file.write(line)


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
        if self._inside or not self._puts(arguments):
            return self.original(**arguments)
        self._inside = True
        try:
            if self.notes.optimizer == "adam":
                return self.original(**arguments)
            self.notes.write("asked")
            engine, *rest = ds_shampoo.initialize(**arguments)
        except ds_shampoo.SettingsError as refusal:
            self.notes.write("refused", message=str(refusal))
            raise
        finally:
            self._inside = False
        self._watch(engine)
        return (engine, *rest)

    def _puts(self, arguments: dict[str, Any]) -> bool:
        """Writes Shampoo into the arguments where they ask for Adam; False where they don't."""
        config = read_config(arguments)
        if config is None:
            return False
        client = arguments.get("optimizer")
        if type(client) in CLASSES:
            params = {key: client.defaults[key] for key in KEPT if key in client.defaults}
            arguments["model_parameters"] = [kept_of(group) for group in client.param_groups]
        elif client is None and asks_for_adam(config):
            params = dict(config["optimizer"].get("params") or {})
        else:
            return False
        if self.notes.optimizer == "adam":
            if client is None:
                config["optimizer"]["params"] = {**params, "torch_adam": True}  # its own wants minutes to be built
                config.setdefault("zero_force_ds_cpu_optimizer", False)
        else:
            arguments["optimizer"] = None
            config["optimizer"] = {"type": "Shampoo", "params": {**SETTINGS, **kept_of(params)}}
        put_config(arguments, config)
        return True

    def _watch(self, engine: Any) -> None:
        """Notes an engine, and the first step that its Shampoo finishes."""
        optimizer = getattr(engine, "basic_optimizer", None)
        if not isinstance(optimizer, ds_shampoo.Shampoo):
            return
        self.notes.write("built", zero=int(engine.zero_optimization_stage()))
        stepped = []

        def step_done(*_: Any) -> None:
            if not stepped:
                stepped.append(True)
                self.notes.write("stepped")

        optimizer.register_step_post_hook(step_done)


def asks_for_adam(config: Mapping[str, Any]) -> bool:
    section = config.get("optimizer")
    kind = section.get("type") if isinstance(section, Mapping) else None
    return isinstance(kind, str) and kind.lower() in NAMES


def kept_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of Adam's settings or a param group of it, those that mean the same to Shampoo."""
    return {key: value for key, value in settings.items() if key in (*KEPT, "params", "name", "moe")}


def read_config(arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """A copy of the config in a call's arguments; None where DeepSpeed is to find out what is wrong with it."""
    config = arguments.get("config") or arguments.get("config_params")
    config = config or getattr(arguments.get("args"), "deepspeed_config", None)
    if isinstance(config, dict):
        return copy.deepcopy(config)
    try:
        return dict(json.loads(Path(config).read_text()))
    except (OSError, TypeError, ValueError):
        return None


def put_config(arguments: dict[str, Any], config: dict[str, Any]) -> None:
    """Puts a config into a call's arguments, in whatever place it stood."""
    arguments.pop("config_params", None)
    args = arguments.get("args")
    if getattr(args, "deepspeed_config", None) is not None:
        arguments["args"] = copy.copy(args)
        arguments["args"].deepspeed_config = None
    arguments["config"] = config


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

    executor.__reduce__ = reduce


def arrive(path: str, optimizer: str, test: str, kind: type[Any]) -> Any:
    """A test object in a process of its own: Shampoo takes its place there, and what a rank raises is noted.

    A rank that fails leaves others waiting for it, and DeepSpeed's pool tells of it only once all are done.
    """
    place = take_place(path, optimizer, test)
    found = kind.__new__(kind)
    run = found.run

    def run_and_note(**fixtures: Any) -> None:
        try:
            run(**fixtures)
        except Exception:
            place.notes.write("raised", rank=os.environ.get("RANK"), text=traceback.format_exc()[-3000:])
            raise

    found.run = run_and_note
    return found
