"""Block states under each parameter, as torch's tools take optimizer state: nested dicts of tensors and numbers.

`torch.distributed.checkpoint` reads a checkpoint into a state of the same structure. So a block's state always has the
same keys and shapes here, whether jobs are under way or not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.config import SettingsError
from ds_shampoo.state.block import misfit

# Under this key a parameter's entry in `Optimizer.state` has its blocks, by number.
BLOCKS = "blocks"


def to_nested(state: Mapping[str, Any], rooted: bool, device: torch.device) -> dict[str, Any]:
    """A block's state, lists as dicts with "0", "1", ... for keys, and zeros for what is not there.

    Args:
        state: as RootKeeper and preconditioner give it together.
        rooted: whether statistics of the roots in force are kept (`root_refresh_threshold` above 0).
        device: where tensors on the host are copied to, since torch's tools want all of a state on one device.
    """
    factors, roots = state["factors"], state["roots"]
    pending = state.get("pending") or {
        "begun_at": 0,
        "due_at": 0,
        "snapshots": [torch.zeros_like(factor) for factor in factors],
        "corrections": [0.0] * len(factors),
        "updates": 0,
    }
    rest = {key: value for key, value in state.items() if key not in ("pending", "rooted")}
    whole = {**rest, "pending": pending}
    if rooted:
        known = len(state["rooted"]) == len(roots)
        kept = state["rooted"] if known else [torch.zeros_like(root, dtype=torch.float32) for root in roots]
        whole |= {"rooted": kept, "rooted_known": known}
    nested = _dicts(whole, device)
    assert isinstance(nested, dict)
    return nested


def from_nested(state: Mapping[str, Any]) -> dict[str, Any]:
    """What `to_nested` was given."""
    found = _lists(state)
    assert isinstance(found, dict)
    if not found["pending"]["due_at"]:
        del found["pending"]
    found["rooted"] = found.get("rooted", []) if found.pop("rooted_known", False) else []
    return found


def check(block: Block, nested: Mapping[str, Any]) -> None:
    """Holds a block's state in `to_nested`'s form against the block, before anything is loaded.

    Raises:
        SettingsError: for what is missing, or of another shape.
    """
    try:
        state = from_nested(nested)
    except (KeyError, TypeError, AttributeError) as error:
        raise SettingsError(
            f"the state of block {block} can't be read: {type(error).__name__}: {error}; it has to be one that "
            "state_dict() gave"
        ) from error
    reason = misfit({**state, "origin": list(block.origin), "shape": list(block.shape)}, block)
    if reason:
        raise SettingsError(f"the state of block {block} does not fit: {reason}; another model or release?")


def _dicts(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {str(key): _dicts(item, device) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return {str(number): _dicts(item, device) for number, item in enumerate(value)}
    return value


def _lists(value: Any) -> Any:
    """Dicts with numbers for keys as lists; other trees as they are."""
    if not isinstance(value, Mapping):
        return value
    items = {str(key): _lists(item) for key, item in value.items()}
    if items and all(key.isdecimal() for key in items):
        return [items[str(number)] for number in range(len(items))]
    return items
