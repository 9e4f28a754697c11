"""One trainer's job after another in the same processes: what a library keeps for the whole process is put back."""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import logging
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"


@contextlib.contextmanager
def fresh() -> Iterator[None]:
    """A process as a launcher makes it: Accelerate and Trainer knew nothing before, and leave nothing."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    environment = dict(os.environ)
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        unset_hf_deepspeed_config()
        os.environ.clear()
        os.environ.update(environment)
        gc.collect()


def refusal(job: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    """The message with which a job is refused; empty if it is not."""
    try:
        job(*arguments, **named)
    except ValueError as error:
        return str(error)
    return ""


@contextlib.contextmanager
def listening() -> Iterator[list[logging.LogRecord]]:
    """What ds_shampoo logs meanwhile."""
    heard: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = heard.append  # type: ignore[method-assign]
    logger = logging.getLogger("ds_shampoo")
    logger.addHandler(handler)
    try:
        yield heard
    finally:
        logger.removeHandler(handler)


def from_example(module: str, name: str) -> Any:
    """Something that one of `examples/` defines."""
    sys.path.append(str(EXAMPLES))
    try:
        return getattr(importlib.import_module(module), name)
    finally:
        sys.path.remove(str(EXAMPLES))


def example(name: str, *arguments: str) -> str:
    """Runs one of `examples/` as its launcher does on this rank; returns what it printed."""
    output, before = io.StringIO(), (list(sys.argv), list(sys.path))
    try:
        sys.argv = [name, *arguments]
        sys.path.insert(0, str(EXAMPLES))  # as for any script that Python is given
        with fresh(), contextlib.redirect_stdout(output):
            runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = before
        print(output.getvalue())
    return output.getvalue()
