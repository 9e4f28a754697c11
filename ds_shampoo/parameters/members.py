"""What optimizers are made of: lists of parameters, of (name, parameter) pairs, or of param groups of either."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor


def listed(params: Any) -> Any:
    """Parameters or param groups that can be looked at more than once, whatever iterators they came in."""
    if isinstance(params, Iterator):
        params = list(params)
    if not isinstance(params, Sequence):
        return params
    return [
        {**member, "params": listed(member["params"])} if isinstance(member, dict) and "params" in member else member
        for member in params
    ]


def tensors_in(members: Iterable[Any]) -> Iterator[Tensor]:
    """The parameters of a list that has them as they are, with names, or in param groups.

    A group's iterator is left alone: whoever makes the optimizer needs what it gives.
    """
    for member in members:
        if isinstance(member, Tensor):
            yield member
        elif isinstance(member, tuple):
            yield member[1]
        elif isinstance(member, Mapping) and isinstance(params := member.get("params"), Tensor | Sequence):
            yield from tensors_in([params] if isinstance(params, Tensor) else params)
