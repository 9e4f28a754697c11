"""What the user says of parameters by name: `roles`, `batch_dims` and `fused_parts`, whose keys are name patterns."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

from torch import nn

from ds_shampoo.algorithm import selection
from ds_shampoo.algorithm.blocks import Parts, matrix_dims
from ds_shampoo.algorithm.selection import Kind, Role
from ds_shampoo.config import SettingsError, ShampooConfig
from ds_shampoo.parameters import marks
from ds_shampoo.sharding.layout import Layout
from ds_shampoo.sharding.partition import LogicalParameter

ROLES = {
    "weight": Role.WEIGHT,
    "embedding": Role.EMBEDDING,
    "head": Role.HEAD,
    "lora": Role.LORA,
    "none": Role.NONE,
}

_SIDES = ("rows", "columns")
# Names that an error shows of all that there are.
_SHOWN = 3

_Value = TypeVar("_Value")


class Named(NamedTuple):
    """A parameter's names, those of this rank's model and of the undivided one, and its shape."""

    names: tuple[str, ...]
    shape: tuple[int, ...]


def overruled(config: ShampooConfig, parameter: Named, found: Kind) -> Kind:
    """What was found a parameter to be, or what the settings' patterns say; the first that matches holds."""
    role = _first_match(config.roles, parameter.names)
    dims = _first_match(config.batch_dims, parameter.names)
    if role is not None:
        found = replace(found, role=ROLES[role])
    if dims is not None:
        found = replace(found, batch=math.prod(parameter.shape[:dims]))
    if role == "lora" and found.rank_dim is None and len(parameter.shape) > 1:  # of a kind that its name does not tell
        rows, *columns = matrix_dims(parameter.shape, found.batch)
        found = replace(found, rank_dim=0 if rows <= math.prod(columns) else -1)
    return found


def parts(config: ShampooConfig, parameter: Named, batch: int, found: Parts | None) -> Parts | None:
    """What a parameter is fused of: what was found, or what the setting's patterns say; None for one matrix.

    Raises:
        SettingsError: where the setting does not fit the parameter.
    """
    dims, asked = matrix_dims(parameter.shape, batch), _first_match(config.fused_parts, parameter.names)
    if asked is None:
        return found if found is not None and found.fit(dims) and len(found.lengths) > 1 else None
    says = f"Shampoo setting 'fused_parts' says {asked} of '{parameter.names[-1]}' of shape {parameter.shape}"
    if len(dims) != 2:
        raise SettingsError(f"{says}: it is no matrix; let the pattern match matrices only")
    outputs = 0 if found is None else found.dim
    if isinstance(asked, int):
        made = Parts(outputs, (dims[outputs] // asked,) * asked)
        why = f"its {_SIDES[outputs]}, {dims[outputs]}, do not divide so"
    else:
        along = outputs if sum(asked) == dims[outputs] else 1 - outputs
        made = Parts(along, tuple(asked))
        why = f"they add up to {sum(asked)}, but it has {dims[0]} rows and {dims[1]} columns"
    if not made.fit(dims):
        raise SettingsError(f"{says}: {why}")
    return made if len(made.lengths) > 1 else None


def asks_for_parts(config: ShampooConfig, names: Sequence[str]) -> bool:
    """Whether the setting `fused_parts` has a pattern that one of these names matches."""
    return _first_match(config.fused_parts, names) is not None


def named(model: nn.Module | None, groups: Iterable[Iterable[LogicalParameter]], layout: Layout) -> Iterator[Named]:
    """The parameters of the param groups, and all of the model's, with all of their names."""
    for parameter in (parameter for group in groups for parameter in group):
        yield Named((parameter.name,), parameter.shape)
    if model is not None:
        aliases = selection.aliases(model)
        for tensor in model.parameters():
            own = aliases[id(tensor)]
            yield Named((*own, layout.name(own[0], tensor)), marks.whole_shape(tensor))


def check(
    config: ShampooConfig,
    parameters: Iterable[Named],
    over_ranks: Callable[[Sequence[Named]], Sequence[Named]],
) -> None:
    """Refuses patterns that mean nothing, on all ranks alike.

    Args:
        parameters: those of this rank's model.
        over_ranks: gives those of all ranks, where ranks have different parts of the model.

    Raises:
        SettingsError: for a pattern that matches no parameter, and for batch dimensions that leave no matrix.
    """
    if not config.roles and not config.batch_dims and not config.fused_parts:
        return
    everyones = over_ranks(list(parameters))
    for key, patterns in (
        ("roles", config.roles),
        ("batch_dims", config.batch_dims),
        ("fused_parts", config.fused_parts),
    ):
        for pattern in patterns or ():
            if not any(_matches(pattern, parameter.names) for parameter in everyones):
                known = [parameter.names[-1] for parameter in everyones]
                more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
                raise SettingsError(
                    f"Shampoo setting '{key}' has the pattern '{pattern}', which matches no parameter; their names are "
                    f"{', '.join(known[:_SHOWN])}{more}"
                )
    for parameter in everyones:
        dims = _first_match(config.batch_dims, parameter.names)
        if dims and len(parameter.shape) - dims < 2:
            raise SettingsError(
                f"Shampoo setting 'batch_dims' says {dims} of '{parameter.names[-1]}' of shape {parameter.shape}: at "
                "least two dimensions have to be left; let the pattern match matrices only (vectors: role 'none')"
            )


def _first_match(patterns: Mapping[str, _Value] | None, names: Sequence[str]) -> _Value | None:
    return next((value for pattern, value in (patterns or {}).items() if _matches(pattern, names)), None)


def _matches(pattern: str, names: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names)
