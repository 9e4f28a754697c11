"""Counts the bytes of tensors that an optimizer keeps, wherever it hides them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor


def state_bytes(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> int:
    """Bytes of all tensors reachable from `optimizer.state_dict()`, the parameters themselves excluded.

    Tensors that share a storage count once, each at the size of the storage: a view keeps all of it alive.
    """
    not_state = {p.untyped_storage().data_ptr() for p in parameters}
    storages: dict[int, int] = {}
    for tensor in _tensors(optimizer.state_dict(), set()):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in not_state:
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: object, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor under `value`, through containers and through the attributes of plain objects."""
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, (str, bytes, int, float, type)):
        return
    seen.add(id(value))
    for child in _children(value):
        yield from _tensors(child, seen)


def _children(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    slots = [getattr(value, name) for name in getattr(type(value), "__slots__", ()) if hasattr(value, name)]
    return [*vars(value).values(), *slots] if hasattr(value, "__dict__") else slots
