"""Something to be done with a module as soon as it has been imported, without importing it for that."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_Action = Callable[[ModuleType], None]


def when_imported(name: str, action: _Action) -> None:
    """Calls `action` with the module of this name: now if it has been imported, and after each import to come."""
    module = sys.modules.get(name)
    if module is not None:
        action(module)
    finder = _Finder(name, action)
    if finder not in sys.meta_path:
        sys.meta_path.insert(0, finder)


@dataclass(frozen=True)
class _Finder(MetaPathFinder):
    """Finds one module as the other finders do, and has its loader call the action."""

    name: str
    action: _Action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        for finder in [finder for finder in sys.meta_path if finder is not self]:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(fullname, path, target) if find is not None else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self.action)
                return spec
        return None


class _Loader(Loader):
    """Loads a module as its own loader does, which it hands the place back to, and then calls the action."""

    def __init__(self, own: Any, action: _Action) -> None:
        self._own, self._action = own, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        found: ModuleType | None = self._own.create_module(spec)
        return found

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._own
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        self._own.exec_module(module)
        self._action(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)
