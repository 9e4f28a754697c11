"""The settings of Shampoo: one flat pydantic model, and errors that name key, value and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError

Beta = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(ge=1)]
Grafting = Literal[
    "none",
    "sgd",
    "adagrad",
    "rmsprop",
    "adam",
    "sgd_normalized",
    "adagrad_normalized",
    "rmsprop_normalized",
    "adam_normalized",
]

# Keys that other frameworks put into a param group and that mean nothing to Shampoo.
GROUP_TAGS = frozenset({"params", "name", "moe", "initial_lr", "param_names", "preconditioned", "group_index"})


class SettingsError(ValueError):
    """A setting that Shampoo refuses; the message names the key, the value and what is allowed."""


class GroupSettings(BaseModel):
    """What each param group may set for itself. `docs/algorithm.md` gives every formula."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    lr: Annotated[float, Field(ge=0)] = 1e-3
    betas: Annotated[tuple[Beta, Beta], Strict(False)] = (0.95, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    decoupled_weight_decay: bool = True
    momentum: Literal["before", "after"] = "before"
    nesterov: bool = True
    grafting: Grafting = "adam"
    block_size: PositiveInt = 1024
    max_preconditioner_dim: PositiveInt | None = None
    merge_small_dims: bool = True
    embedding: Literal["diagonal", "one_sided", "blocked"] = "diagonal"
    # The ridge relative to the largest eigenvalue.
    matrix_epsilon: Annotated[float, Field(gt=0, le=1e-1)] = 1e-6
    inverse_exponent_override: PositiveInt | None = None
    start_preconditioning_step: PositiveInt = 1
    statistics_beta: Annotated[float, Field(gt=0, le=1)] = 0.5
    statistics_interval: PositiveInt = 1
    root_interval: PositiveInt = 10
    root_method: Literal["eigh", "newton"] = "eigh"
    root_refresh_threshold: Annotated[float, Field(ge=0)] = 0.0
    max_root_failures: PositiveInt = 5


class ShampooConfig(GroupSettings):
    """Everything the JSON's `optimizer.params` section may hold: the group settings and the job-wide ones."""

    exchange_dtype: Literal["float32", "bfloat16"] = "float32"
    root_overlap: bool = False
    root_delay: PositiveInt | None = None
    root_threads: PositiveInt | None = None
    root_cores: Literal["auto"] | list[Annotated[int, Field(ge=0)]] = "auto"


_Settings = TypeVar("_Settings", bound=GroupSettings)

# The keys that say how host threads compute roots beside the training step.
_OVERLAP_KEYS = ("root_overlap", "root_delay", "root_threads", "root_cores")
_JOB_KEYS = frozenset(ShampooConfig.model_fields) - frozenset(GroupSettings.model_fields)


def parse(settings: Mapping[str, Any]) -> ShampooConfig:
    """Checks all settings together.

    Raises:
        SettingsError: for an unknown key, a wrong type, a value out of range, or a combination that is
            not available.
    """
    config = _validate(ShampooConfig, settings)
    changed = [key for key in _OVERLAP_KEYS if getattr(config, key) != ShampooConfig.model_fields[key].default]
    if changed:
        raise SettingsError(
            f"Shampoo setting '{changed[0]}' = {getattr(config, changed[0])!r}: roots on background host "
            "threads are not available yet; leave out root_overlap, root_delay, root_threads and root_cores "
            "(roots are then computed within the step, every root_interval steps)"
        )
    return config


def parse_group(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> GroupSettings:
    """Checks one param group's own settings over the optimizer's defaults.

    Keys foreign to Shampoo are left alone (frameworks tag their groups) unless they look like a misspelt
    setting.

    Raises:
        SettingsError: as `parse`, and for a job-wide key in a group.
    """
    own = {key: value for key, value in group.items() if key not in GROUP_TAGS}
    for key, value in own.items():
        if key in _JOB_KEYS:
            raise SettingsError(f"Shampoo setting '{key}' holds for the whole job and can't be set in a param group")
        if key not in GroupSettings.model_fields and _nearest(key, GroupSettings.model_fields):
            raise _unknown(key, value, GroupSettings.model_fields)
    preconditioned = group.get("preconditioned", True)
    if not isinstance(preconditioned, bool):
        raise SettingsError(f"param group key 'preconditioned' = {preconditioned!r}: must be true or false")
    known = {key: value for key, value in own.items() if key in GroupSettings.model_fields}
    return _validate(GroupSettings, {**defaults, **known})


def group_settings(group: Mapping[str, Any]) -> GroupSettings:
    """The present settings of a checked param group, which a scheduler may have changed since; not checked again."""
    return GroupSettings.model_construct(**{key: group[key] for key in GroupSettings.model_fields})


def _validate(model: type[_Settings], settings: Mapping[str, Any]) -> _Settings:
    try:
        return model(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise _unknown(key, settings[key], model.model_fields) from None
        place = "".join(f"[{part}]" for part in first["loc"][1:] if isinstance(part, int))
        raise SettingsError(f"Shampoo setting '{key}{place}' = {first['input']!r}: {first['msg']}") from None


def _unknown(key: str, value: object, known: Iterable[str]) -> SettingsError:
    nearest = _nearest(key, known)
    hint = f"did you mean '{nearest}'? " if nearest else ""
    return SettingsError(
        f"Shampoo setting '{key}' = {value!r}: unknown key; {hint}The keys are: {', '.join(sorted(known))}"
    )


def _nearest(key: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(key, list(known), n=1, cutoff=0.75)), None)
