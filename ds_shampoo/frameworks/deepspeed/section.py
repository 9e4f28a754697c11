"""What a DeepSpeed config says beside Shampoo's own settings: refused or said by name where it would do nothing."""

from __future__ import annotations

import difflib
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ds_shampoo.algorithm.preconditioners.defaults import filled
from ds_shampoo.config import SettingsError, ShampooConfig
from ds_shampoo.frameworks.deepspeed import internals

logger = logging.getLogger("ds_shampoo")

TYPE = "Shampoo"

# What DeepSpeed reads in the optimizer section.
_SECTION_KEYS = ("type", "params", "legacy_fusion")

# What a config that names Shampoo needs, and why.
_NEEDED = {
    "zero_allow_untested_optimizer": (True, "DeepSpeed refuses optimizers that are not its own otherwise"),
    "zero_force_ds_cpu_optimizer": (False, "with it DeepSpeed refuses under offload what is not its CPU Adam"),
}

# Where "auto" is no value of the setting itself.
_NEVER_AUTO = frozenset(ShampooConfig.model_fields) - {"root_cores"}

# The defaults of adam_beta1 and adam_beta2 in Hugging Face's TrainingArguments.
_ADAMS_BETAS = (0.9, 0.999)


def names_shampoo(config: Mapping[str, Any]) -> bool:
    """Whether a DeepSpeed config's optimizer is Shampoo.

    Raises:
        SettingsError: where the section is no section, or its type is Shampoo by another spelling.
    """
    section = config.get("optimizer")
    if section is None:
        return False
    example = f'"optimizer": {{"type": "{TYPE}", "params": {{"lr": 0.001}}}}'
    if not isinstance(section, Mapping):
        raise SettingsError(f"optimizer = {section!r}: must be an object, as {example}")
    name = section.get("type")
    if name is not None and not isinstance(name, str):
        raise SettingsError(f"optimizer.type = {name!r}: must be a string, as {example}")
    if name is not None and name != TYPE and not hasattr(torch.optim, name) and _means_shampoo(name):
        raise SettingsError(f'optimizer.type = "{name}": did you mean "{TYPE}"?')
    return name == TYPE


def check_config(config: Mapping[str, Any]) -> None:
    """Checks the optimizer section of a config that names Shampoo.

    Raises:
        SettingsError: for a key in the section that nobody reads, for params that are no object, and for an "auto"
            in them that no trainer has filled in.
    """
    section: Any = config.get("optimizer") or {}
    for key in section:
        if key not in _SECTION_KEYS:
            raise SettingsError(
                f"optimizer.{key} = {section[key]!r}: nobody reads that; Shampoo's settings stand in "
                f'optimizer.params: {{"type": "{TYPE}", "params": {{"{key}": ...}}}}'
            )
    params = section.get("params")
    if params is not None and not isinstance(params, Mapping):
        raise SettingsError(f'optimizer.params = {params!r}: must be an object, as {{"lr": 0.001}}')
    for key, value in (params or {}).items():
        if value == "auto" and key in _NEVER_AUTO:
            raise SettingsError(
                f"Shampoo setting '{key}' = \"auto\": nobody has filled it in. Hugging Face's Trainer does so for "
                "lr, betas, eps and weight_decay, Accelerate for lr and weight_decay; give a value, or leave it out "
                f"for {filled(params or {}).get(key, ShampooConfig.model_fields[key].default)!r}"
            )


def complete(config: dict[str, Any]) -> None:
    """Sets what Shampoo needs in a config that names it; what the config says otherwise is logged."""
    for key, (needed, _) in _NEEDED.items():
        say_what_does_not_hold(config, key)
        config[key] = needed


def complete_config_of(engine: Any) -> None:
    """The same for an engine that is being built, and that turns out to get a Shampoo."""
    for key, (needed, _) in _NEEDED.items():
        say_what_does_not_hold(config_of(engine), key)
        internals.override_config(engine, key, needed)


def say_what_does_not_hold(config: Mapping[str, Any], key: str = "zero_force_ds_cpu_optimizer") -> None:
    """Logs a warning, on the first rank, where a config says otherwise than it will be with Shampoo."""
    needed, reason = _NEEDED[key]
    if config.get(key, needed) != needed and int(os.environ.get("RANK", "0")) == 0:
        logger.warning("%s = %s in the config does not hold with Shampoo: %s", key, config[key], reason)


def say_whose_betas(settings: Mapping[str, Any]) -> None:
    """Logs a warning, on the first rank, where Hugging Face's Trainer has put Adam's betas over Shampoo's.

    It does so for `"betas": "auto"`. What the JSON said before, nobody knows any more; so the message is true of betas
    that were written down as well.
    """
    in_use = getattr(sys.modules.get("transformers.integrations.deepspeed"), "deepspeed_config", None)
    if in_use is None or in_use() is None or int(os.environ.get("RANK", "0")):
        return
    betas, own = settings.get("betas"), filled({**settings, "betas": None})["betas"]
    if isinstance(betas, list | tuple) and tuple(betas) == _ADAMS_BETAS:
        logger.warning(
            "betas = %s are Adam's, the default of TrainingArguments, which \"auto\" takes; Shampoo's own are %s: "
            "leave betas out of the JSON, or set adam_beta1 = %s and adam_beta2 = %s",
            list(betas),
            list(own),
            *own,
        )


def distinct_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON; the last of two equal keys would hold without a word.

    Raises:
        SettingsError: naming the keys that stand there twice.
    """
    pairs = list(pairs)
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise SettingsError(f"the DeepSpeed config has more than one {', '.join(map(repr, twice))} in one object")
    return dict(pairs)


def config_of(engine: Any) -> Mapping[str, Any]:
    """The config from which an engine is built, as far as this DeepSpeed shows it."""
    config = internals.config_of(engine)
    return config if isinstance(config, Mapping) else {}


def _means_shampoo(name: str) -> bool:
    plain = name.lower().replace("_", "").replace("-", "")
    return "shampoo" in plain or bool(difflib.get_close_matches(plain, ["shampoo"], cutoff=0.75))
