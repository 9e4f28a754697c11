"""The pytest plugin under which DeepSpeed's tests run: what each came to, into the run's file of notes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Generator
from inspect import isabstract
from pathlib import Path
from typing import Any

import pytest

from benchmarks.deepspeed_suite.stand_in import Notes, carry, take_place

NOTES, OPTIMIZER, COLLECTED = "DS_SUITE_NOTES", "DS_SUITE_OPTIMIZER", "DS_SUITE_COLLECTED"
_LONGEST = 6000


def pytest_configure(config: pytest.Config) -> None:
    # Ranks are forked from a server that has imported what takes seconds.
    multiprocessing.set_forkserver_preload(["benchmarks.deepspeed_suite.stand_in", "unit.simple_model"])
    if NOTES in os.environ:
        config.pluginmanager.register(_Recorder(Path(os.environ[NOTES]), os.environ[OPTIMIZER]))
    if COLLECTED in os.environ:
        config.pluginmanager.register(_Collector(Path(os.environ[COLLECTED])))


@pytest.hookimpl(wrapper=True)
def pytest_pycollect_makemodule() -> Generator[None, Any, Any]:
    """Makes fixtures of the classes by which DeepSpeed's tests start ranks beforehand.

    They mark those in a way that pytest has not known since 8.4; DeepSpeed asks for an older one.
    """
    module: Any = yield
    # A module that can't be imported, or skips itself, says so once more when it is collected.
    with contextlib.suppress(Exception, pytest.skip.Exception):
        for name, kind in vars(module.obj).copy().items():
            if isinstance(kind, type) and getattr(kind, "is_dist_fixture", False) and not isabstract(kind):
                setattr(module.obj, f"fixture_{name}", pytest.fixture(name=name)(_maker(kind)))
    return module


def _maker(kind: type[Any]) -> Callable[[], Any]:
    def make() -> Any:
        return kind()

    make.is_dist_fixture = True  # type: ignore[attr-defined]
    return make


class _Collector:
    """Writes down which tests there are, and why some files' can't be had."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.errors: dict[str, str] = {}

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.errors[report.nodeid] = report.longreprtext[-_LONGEST:]

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        found = {"tests": [item.nodeid for item in session.items], "errors": self.errors}
        self.path.write_text(json.dumps(found))


class _Recorder:
    def __init__(self, path: Path, optimizer: str) -> None:
        self.path, self.optimizer = path, optimizer
        self.notes: Notes | None = None
        self.begun = 0.0
        self.worst = ("passed", "")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.notes = take_place(str(self.path), self.optimizer, nodeid).notes
        common = sys.modules.get("unit.common")
        if common is not None:
            carry(common.DistributedExec, self.notes)
        self.begun = time.monotonic()
        self.worst = ("passed", "")
        self.notes.write("begun")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.worst = ("failed", report.longreprtext[-_LONGEST:])
        elif report.skipped and self.worst[0] == "passed":
            reason: Any = report.longrepr
            self.worst = ("skipped", str(reason[2] if isinstance(reason, tuple) else reason)[-_LONGEST:])

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        assert self.notes is not None
        outcome, text = self.worst
        seconds = round(time.monotonic() - self.begun, 1)
        self.notes.write("ended", outcome=outcome, text=text, seconds=seconds)
