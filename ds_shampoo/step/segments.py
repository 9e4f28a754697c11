"""Segments: how a tensor of several roles is cut, and only where their elementwise settings really differ."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from ds_shampoo.auxiliary import SettingsRole
from ds_shampoo.sharding.fragments import Fragment

# Every role, with the first of those whose settings are the same.
Alike: TypeAlias = Mapping[SettingsRole, SettingsRole]


class Segment(NamedTuple):
    """A part of a flat tensor whose elements are stepped by the settings of one role."""

    part: slice
    role: SettingsRole


_WHOLE = slice(0, None)


def alike(settings: Mapping[SettingsRole, Hashable]) -> Alike:
    """Which roles have the same of what a part of the step goes by."""
    first: dict[Hashable, SettingsRole] = {}
    return {role: first.setdefault(value, role) for role, value in settings.items()}


class Runs:
    """Of which roles the elements of one tensor are: a whole parameter's of one, a flat shard's of any in turn."""

    def __init__(self, runs: Sequence[tuple[int, SettingsRole]] = ((0, None),)) -> None:
        """`runs` are where each begins, the first at 0, and its role; it goes on to the next, over padding too."""
        self._runs = runs
        self._cut: dict[tuple[SettingsRole, ...], list[Segment]] = {}

    def segments(self, same: Alike) -> Sequence[Segment]:
        """The tensor in as few parts as `same` allows: neighbours of roles that are alike are one."""
        if len(self._runs) == 1:
            return [Segment(_WHOLE, same[self._runs[0][1]])]
        key = tuple(same.values())
        if key not in self._cut:
            self._cut[key] = _merged([(start, same[role]) for start, role in self._runs])
        return self._cut[key]


# What nothing is known of, as a shard of padding alone.
UNKNOWN = Runs()


def runs_by_buffer(fragments: Iterable[Fragment], roles: Mapping[str, SettingsRole]) -> dict[int, Runs]:
    """The runs of each of a rank's buffers that has any.

    Args:
        fragments: the rank's own.
        roles: by parameter.
    """
    found: dict[int, list[tuple[int, SettingsRole]]] = {}
    for fragment in sorted(fragments, key=lambda fragment: (fragment.buffer, fragment.offset)):
        runs = found.setdefault(fragment.buffer, [])
        runs.append((fragment.offset if runs else 0, roles[fragment.parameter]))
    return {buffer: Runs(runs) for buffer, runs in found.items()}


def _merged(runs: Sequence[tuple[int, SettingsRole]]) -> list[Segment]:
    starts = [run for i, run in enumerate(runs) if i == 0 or run[1] != runs[i - 1][1]]
    ends = [start for start, _ in starts[1:]]
    return [Segment(slice(start, end), role) for (start, role), end in zip(starts, [*ends, None], strict=True)]
