"""The settings of Shampoo: one flat pydantic model, and errors that name key, value and what is allowed."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    model_validator,
)

from ds_shampoo.algorithm.precision import MatmulPrecision
from ds_shampoo.algorithm.preconditioners import PRECONDITIONERS
from ds_shampoo.algorithm.preconditioners.defaults import LEFT_OPEN, USUAL, filled
from ds_shampoo.auxiliary import (
    AUXILIARY_ROLES,
    ROLE_SYNONYMS,
    RoleSettings,
    SettingsRole,
    plain_spelling,
    resembles_a_key,
)
from ds_shampoo.values import parse_cores, parse_length, parse_parts


def _known_preconditioner(name: str) -> str:
    if name not in PRECONDITIONERS:
        raise ValueError(f"must be one of {', '.join(map(repr, PRECONDITIONERS))}")
    return name


# Bounds keep every number of a step inside fp32's range, whatever else is set; who needs more has a mistake elsewhere.
Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[Beta, Beta], Strict(False)]
Eps = Annotated[float, Field(ge=1e-30, le=1e3)]
LARGEST_RATE = 1e6
Rate = Annotated[float, Field(ge=0, le=LARGEST_RATE)]
Decay = Annotated[float, Field(ge=0, le=1e3)]
StatisticsOf = Literal["gradients", "differences"]
StatisticsBeta = Annotated[float, Field(gt=0, le=1)]
PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
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

Dtype = Literal["float32", "bfloat16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# What other optimizers and trainers call our keys. In a param group such a key would do nothing, without a word.
SYNONYMS = {
    "learning_rate": "lr",
    "learningrate": "lr",
    "beta": "betas",
    "beta1": "betas",
    "beta2": "betas",
    "beta3": "statistics_beta",
    "beta_1": "betas",
    "beta_2": "betas",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "momentum_beta": "betas",
    "shampoo_beta": "statistics_beta",
    "preconditioner_decay": "statistics_beta",
    "epsilon": "eps",
    "adam_epsilon": "eps",
    "grafting_epsilon": "eps",
    "grafting_beta2": "betas",
    "wd": "weight_decay",
    "decay": "weight_decay",
    "l2": "weight_decay",
    "use_decoupled_weight_decay": "decoupled_weight_decay",
    "use_nesterov": "nesterov",
    "graft": "grafting",
    "graft_type": "grafting",
    "grafting_type": "grafting",
    "grafting_config": "grafting",
    "damping": "matrix_epsilon",
    "ridge": "matrix_epsilon",
    "exponent_override": "inverse_exponent_override",
    "inv_root_override": "inverse_exponent_override",
    "precondition_frequency": "root_interval",
    "preconditioning_frequency": "root_interval",
    "preconditioning_compute_steps": "root_interval",
    "statistics_compute_steps": "statistics_interval",
    "update_freq": "root_interval",
    "max_preconditioner_size": "max_preconditioner_dim",
    "use_merge_dims": "merge_small_dims",
    "precondition": "preconditioned",
}

# Keys that other frameworks put into a param group and that mean nothing to Shampoo.
GROUP_TAGS = frozenset(
    {"params", "name", "moe", "initial_lr", "param_names", "preconditioned", "group_index"}
    | {"base_lr", "max_lr", "min_lr", "base_momentum", "max_momentum"}  # torch's and Megatron's schedulers
)
# What marks a key as one by which a trainer scales a setting itself.
_SCALES = ("_mult", "_multiplier", "_scale", "_ratio")


class SettingsError(ValueError):
    """A setting that Shampoo refuses; the message names the key, the value and what is allowed."""


class _Common(BaseModel):
    """What has one default, whatever the preconditioner is."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    lr: Rate = 1e-3
    eps: Eps = 1e-8
    weight_decay: Decay = 0.0
    # A role's own; `settings_by_role` says what None stands for.
    embedding_lr_scale: Rate | None = None
    embedding_betas: Betas | None = None
    embedding_eps: Eps | None = None
    embedding_weight_decay: Decay | None = None
    head_lr_scale: Rate | None = None
    head_betas: Betas | None = None
    head_eps: Eps | None = None
    head_weight_decay: Decay | None = None
    vector_lr_scale: Rate | None = None
    vector_betas: Betas | None = None
    vector_eps: Eps | None = None
    vector_weight_decay: Decay | None = None
    decoupled_weight_decay: bool = True
    momentum: Literal["before", "after"] = "before"
    nesterov: bool = True
    # In which the decay of the gradient's average rises from the start to betas[0].
    momentum_warmup_steps: Annotated[int, Field(ge=0, le=100_000)] = 0
    momentum_warmup_start: Beta = 0.85
    grafting: Grafting = "adam"
    preconditioner: Annotated[str, AfterValidator(_known_preconditioner)] = USUAL
    block_size: PositiveInt = 1024
    max_preconditioner_dim: PositiveInt | None = None
    # Of the elements of a block's largest factor to the block's.
    max_factor_ratio: Annotated[float, Field(ge=1, le=1e6)] | None = 16.0
    merge_small_dims: bool = True
    embedding: Literal["diagonal", "one_sided", "blocked"] = "diagonal"
    # The ridge relative to the largest eigenvalue.
    matrix_epsilon: Annotated[float, Field(ge=1e-16, le=1e-1)] = 1e-6
    # A root of order 64 brings eigenvalues that are a factor of 40 apart to within 6 per cent of each other's.
    inverse_exponent_override: Annotated[int, Field(ge=1, le=64)] | None = None
    start_preconditioning_step: PositiveInt = 1
    statistics_interval: PositiveInt = 1
    root_method: Literal["eigh", "newton"] = "eigh"
    root_dtype: Dtype = "float32"
    # Two statistics of norm 1 are at most sqrt(2) apart.
    root_refresh_threshold: Annotated[float, Field(ge=0, lt=1.5)] = 0.0
    max_root_failures: PositiveInt = 5


class GroupSettings(_Common):
    """What each param group may set for itself. `docs/algorithm.md` gives every formula.

    What its preconditioner has a default for takes that where it is missing or None.
    """

    embedding_lr_scale: Rate
    betas: Betas
    # The root mean square of a block's direction, or its grafting step's norm.
    direction_rms: Annotated[float | Literal["grafting"], BeforeValidator(parse_length)]
    statistics_of: StatisticsOf
    statistics_beta: StatisticsBeta
    matmul_precision: MatmulPrecision
    root_interval: PositiveInt

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, settings: dict[str, Any]) -> dict[str, Any]:
        return filled(settings)


class ShampooConfig(_Common):
    """Everything the JSON's `optimizer.params` section may hold: the group settings and the job-wide ones.

    Those that a preconditioner has a default for are None where nobody set them.
    """

    betas: Betas | None = None
    direction_rms: Annotated[float | Literal["grafting"] | None, BeforeValidator(parse_length)] = None
    statistics_of: StatisticsOf | None = None
    statistics_beta: StatisticsBeta | None = None
    matmul_precision: MatmulPrecision | None = None
    root_interval: PositiveInt | None = None

    # By patterns of parameters' names.
    roles: dict[str, Literal["weight", "embedding", "head", "lora", "none"]] | None = None
    batch_dims: dict[str, Annotated[int, Field(ge=0)]] | None = None
    fused_parts: dict[str, Annotated[int | list[int], BeforeValidator(parse_parts)]] | None = None
    exchange_dtype: Dtype = "float32"
    root_overlap: bool = True
    root_delay: Annotated[int, Field(ge=0)] | None = None
    root_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    root_cores: Annotated[Literal["auto"] | list[int], BeforeValidator(parse_cores)] = "auto"
    # Seconds that one root may take; a thread at it for longer is taken to hang.
    root_timeout: Annotated[float, Field(gt=0, le=1e6)] = 120.0

    def of_group(self) -> GroupSettings:
        """What the settings come to in a param group that has none of its own."""
        return GroupSettings(**{key: getattr(self, key) for key in GroupSettings.model_fields})


def settings_by_role(settings: GroupSettings) -> dict[SettingsRole, RoleSettings]:
    """The elementwise settings of hidden matrices, under None, and of every other role.

    A role's rate is its scale, by default 1, times the group's; what else it has not set itself is the group's.
    """
    own = RoleSettings(settings.lr, settings.betas, settings.eps, settings.weight_decay)
    found: dict[SettingsRole, RoleSettings] = {None: own}
    for role in AUXILIARY_ROLES:
        scale = getattr(settings, f"{role}_lr_scale")
        roles = {key: getattr(settings, f"{role}_{key}") for key in ("betas", "eps", "weight_decay")}
        changed = {key: value for key, value in roles.items() if value is not None}
        found[role] = own._replace(lr=own.lr if scale is None else own.lr * scale, **changed)
    return found


_Settings = TypeVar("_Settings", bound=_Common)

# Each rank's own affair; all else decides what is computed, and is the same on all ranks.
OF_THE_MACHINE = frozenset({"root_threads", "root_cores", "root_timeout"})

_JOB_KEYS = frozenset(ShampooConfig.model_fields) - frozenset(GroupSettings.model_fields)
_GROUP_KEYS = frozenset(GroupSettings.model_fields) | {"preconditioned"}


def parse(settings: Mapping[str, Any]) -> ShampooConfig:
    """Checks all settings together.

    Raises:
        SettingsError: for an unknown key, a wrong type, a value out of range, or a combination that is
            not available.
    """
    config = _validate(ShampooConfig, settings)
    if config.root_overlap and config.root_delay == 0:
        raise SettingsError(
            "Shampoo setting 'root_delay' = 0: with root_overlap a root is put in force 1 to root_interval steps "
            "after its statistics; for roots computed within the step set root_overlap to false"
        )
    settings_of_groups = config.of_group()
    check_delay(settings_of_groups, config.root_delay)
    _check_combinations(settings_of_groups)
    return config


def check_delay(settings: GroupSettings, delay: int | None) -> None:
    """Refuses a delay that is longer than the settings' interval.

    Raises:
        SettingsError: naming both.
    """
    if delay is not None and delay > settings.root_interval:
        raise SettingsError(
            f"Shampoo setting 'root_delay' = {delay}: must be at most root_interval, which is {settings.root_interval}"
        )


def _check_combinations(settings: GroupSettings) -> None:
    """Refuses what adds up from step to step: roots rescaled in a dtype that rounds each time, decay past zero.

    Raises:
        SettingsError: naming both settings.
    """
    for role, own in settings_by_role(settings).items():
        scale = None if role is None else getattr(settings, f"{role}_lr_scale")
        rate = f"'lr' = {settings.lr}" + ("" if scale in (None, 1) else f" and '{role}_lr_scale' = {scale}")
        if own.lr > LARGEST_RATE:
            raise SettingsError(f"Shampoo setting {rate}: their product must be at most {LARGEST_RATE:g}")
        if own.lr * own.weight_decay >= 2:
            key = "weight_decay" if role is None else f"{role}_weight_decay"
            key = "weight_decay" if getattr(settings, key) is None else key
            raise SettingsError(
                f"Shampoo setting '{key}' = {own.weight_decay} with {rate}: their product must be below 2: weights "
                "would grow with every step, in turns of sign"
            )
    if settings.root_refresh_threshold > 0 and settings.root_dtype != "float32":
        raise SettingsError(
            f"Shampoo setting 'root_dtype' = '{settings.root_dtype}': must be 'float32' where root_refresh_threshold "
            f"is above 0, which is {settings.root_refresh_threshold}: roots that are skipped are rescaled in place"
        )


def parse_group(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> GroupSettings:
    """Checks one param group's own settings over the optimizer's, and both over its preconditioner's defaults.

    Keys foreign to Shampoo are left alone (frameworks tag their groups) unless they look like a misspelt one, or are
    what others call one of Shampoo's. A group with a rate of its own has that for its embeddings too, unless a scale is
    set for them.

    Raises:
        SettingsError: as `parse`, and for a job-wide key in a group.
    """
    own = {key: value for key, value in group.items() if key not in GROUP_TAGS}
    for key, value in own.items():
        if not isinstance(key, str):
            raise SettingsError(f"param group key {key!r}: must be a string")
        if key in _JOB_KEYS:
            raise SettingsError(f"Shampoo setting '{key}' holds for the whole job and can't be set in a param group")
        passes = key in GroupSettings.model_fields or (key.endswith(_SCALES) and not resembles_a_key(key))
        if not passes and _nearest(key, _JOB_KEYS | _GROUP_KEYS):
            raise _unknown(key, value, _GROUP_KEYS, _JOB_KEYS)
    preconditioned = group.get("preconditioned", True)
    if not isinstance(preconditioned, bool):
        raise SettingsError(f"param group key 'preconditioned' = {preconditioned!r}: must be true or false")
    known = {key: value for key, value in own.items() if key in GroupSettings.model_fields}
    known = {key: value for key, value in known.items() if value is not None or key not in LEFT_OPEN}
    if "lr" in known and known["lr"] != defaults.get("lr"):
        known = {"embedding_lr_scale": defaults.get("embedding_lr_scale", 1.0), **known}
    settings = _validate(GroupSettings, {**defaults, **known})
    _check_combinations(settings)
    return settings


def present_settings(group: Mapping[str, Any]) -> dict[str, Any]:
    """The present values of a checked param group's settings, which a scheduler may have changed since.

    Numbers of other kinds, such as NumPy's or a tensor of one element, become Python's.
    """
    return {key: _plain(group[key]) for key in GroupSettings.model_fields}


def checked_settings(present: Mapping[str, Any]) -> GroupSettings:
    """What `present_settings` gave, looked at anew.

    Raises:
        SettingsError: for a value of a wrong type or out of range, or a combination that is not available.
    """
    settings = _validate(GroupSettings, present)
    _check_combinations(settings)
    return settings


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_plain(item) for item in value)
    if isinstance(value, bool | int | float | str | None):
        return value
    scalar = isinstance(value, numbers.Real) or (isinstance(value, torch.Tensor) and value.numel() == 1)
    return float(value) if scalar else value


def _validate(model: type[_Settings], settings: Mapping[str, Any]) -> _Settings:
    try:
        return model(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            raise _unknown(key, settings[key], model.model_fields) from None
        patterns = settings[key] if isinstance(settings[key], dict) else ()
        place = "".join(f"[{part}]" for part in first["loc"][1:] if isinstance(part, int) or part in patterns)
        raise SettingsError(
            f"Shampoo setting '{key}{place}' = {first['input']!r}: {first['msg'].removeprefix('Value error, ')}"
        ) from None


def _unknown(key: str, value: object, known: Iterable[str], elsewhere: Iterable[str] = ()) -> SettingsError:
    nearest = _nearest(key, [*known, *elsewhere])
    hint = f"did you mean '{nearest}'? " if nearest else ""
    return SettingsError(
        f"Shampoo setting '{key}' = {value!r}: unknown key; {hint}The keys are: {', '.join(sorted(known))}"
    )


def _nearest(key: str, known: Iterable[str]) -> str | None:
    """Which of the known keys is meant, by another's name for it or by its spelling; None where neither is close."""
    known, plain = list(known), plain_spelling(key)
    for synonyms in (SYNONYMS, ROLE_SYNONYMS):
        if synonyms.get(plain) in known:
            return synonyms[plain]
    return next(iter(difflib.get_close_matches(plain, known, n=1, cutoff=0.75)), None)
