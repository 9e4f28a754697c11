"""What settings came to that belong to a preconditioner, and who set them: lines of the table at start."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

# From a param group, by setting.
Origins: TypeAlias = Callable[[Mapping[str, Any]], Mapping[str, str]]


def describe_settings(groups: Sequence[Mapping[str, Any]], origins: Origins, delays: Mapping[int, int]) -> str:
    """A line for all param groups that are alike in these settings; `delays` are of their roots, by group_index."""
    alike: dict[str, list[int]] = defaultdict(list)
    for group in groups:
        index = group["group_index"]
        alike[f"{_described(group, origins(group))}; root_delay {delays[index]}"].append(index)
    several = len(alike) > 1
    return "\n".join(f"{text}{_of(indices) if several else ''}" for text, indices in alike.items())


def _described(group: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    by_origin: dict[str, list[str]] = defaultdict(list)
    for key, origin in origins.items():
        by_origin[origin].append(f"{key} {group[key]}")
    parts = "; ".join(f"{origin}: {', '.join(found)}" for origin, found in by_origin.items())
    return f'preconditioner "{group["preconditioner"]}": {parts}'


def _of(indices: Sequence[int]) -> str:
    return f" (param group{'s' if len(indices) > 1 else ''} {', '.join(map(str, indices))})"
