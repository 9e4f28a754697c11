"""A host framework as installed: its release, held against those that Shampoo knows and what it names in them."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ds_shampoo.config import SettingsError
from ds_shampoo.frameworks.privates import Private, faults

logger = logging.getLogger("ds_shampoo")


@dataclass(frozen=True)
class Installed:
    """A framework.

    Attributes:
        name: what it is called.
        package: the module that has its `__version__`.
        tested: the release that everything was tested with.
        oldest: the oldest one that may be used.
        names: what Shampoo names in it.
    """

    name: str
    package: str
    tested: tuple[int, ...]
    oldest: tuple[int, ...]
    names: tuple[Private, ...]

    @property
    def tested_version(self) -> str:
        """The release that everything was tested with."""
        return _text(self.tested)

    @property
    def version(self) -> str:
        """The installed release, as it calls itself."""
        return str(importlib.import_module(self.package).__version__)

    def release(self) -> tuple[int, ...]:
        """The installed release; one later than all where its version has no numbers."""
        numbers = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", self.version)
        return tuple(int(number or 0) for number in numbers.groups()) if numbers else (sys.maxsize,)

    def check(self) -> None:
        """Holds the installed release against all of `names`, once per process; a newer one is warned of.

        Raises:
            SettingsError: if it is too old, or anything is missing or has become something else, listing all of it.
        """
        _check(self, self.release())

    def refuse_moved(self, names: Iterable[Private]) -> None:
        """Holds the installed release against some names.

        Raises:
            SettingsError: listing those that are missing or have become something else.
        """
        moved = faults(names, self.release())
        if moved:
            raise SettingsError(
                f"{self.name} {self.version} lacks what Shampoo needs of it, or has it otherwise: {'; '.join(moved)}. "
                f"Shampoo was tested with {self.name} {self.tested_version}: install that"
            )

    def of(self, holder: Any, name: str) -> Any:
        """An attribute of one of the framework's objects, by one of `names`.

        Raises:
            RuntimeError: if it is not there, naming it.
        """
        missing = object()
        found = getattr(holder, name, missing)
        if found is missing:
            known = next(str(private) for private in self.names if private.name == name)
            raise RuntimeError(
                f"{self.name} {self.version}: a {type(holder).__name__} has no '{name}', where Shampoo looks for "
                f"{known} of {self.name} {self.tested_version}, with which it was tested"
            )
        return found


@functools.cache
def _check(framework: Installed, found: tuple[int, ...]) -> None:
    if found < framework.oldest:
        raise SettingsError(f"{framework.name} {framework.version}: Shampoo needs {_text(framework.oldest)} or newer")
    framework.refuse_moved(framework.names)
    if found[:2] > framework.tested[:2] and int(os.environ.get("RANK", "0")) == 0:
        logger.warning(
            "Shampoo was tested with %s %s, not with %s; all that it uses was found there",
            *(framework.name, framework.tested_version, framework.version),
        )


def _text(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))
