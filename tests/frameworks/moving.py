"""Gives what Shampoo names in a host framework another name in the installed release, as a later one might."""

from __future__ import annotations

from types import CodeType, FunctionType
from typing import Any

import pytest

from ds_shampoo.frameworks.privates import Field, Given, Mark, Private, Quoted, functions, resolve


def move(patch: pytest.MonkeyPatch, name: Private) -> None:
    """Until `patch` is undone."""
    owner = resolve(name.owner)
    if isinstance(name, Given | Mark | Quoted):
        for function in {id(function): function for function in functions(owner)}.values():
            assert isinstance(function, FunctionType)
            patch.setattr(function, "__code__", renamed(function.__code__, name.name))
    elif isinstance(name, Field):
        fields = {key: field for key, field in owner.__dataclass_fields__.items() if key != name.name}
        patch.setattr(owner, "__dataclass_fields__", fields)
    else:
        holder = next(base for base in getattr(owner, "__mro__", [owner]) if name.name in vars(base))
        patch.delattr(holder, name.name)


def renamed(code: CodeType, name: str) -> CodeType:
    """The code with another name in this one's place, as an attribute and as a string, in functions within it too."""

    def other(found: Any) -> Any:
        if isinstance(found, tuple):
            return tuple(map(other, found))
        if isinstance(found, CodeType):
            return renamed(found, name)
        return f"{name}_moved" if found == name else found

    return code.replace(co_names=other(code.co_names), co_consts=other(code.co_consts))
