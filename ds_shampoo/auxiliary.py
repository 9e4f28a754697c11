"""The roles of what is not a hidden matrix, whose elementwise settings may be their own, and how others call these."""

from __future__ import annotations

import difflib
from typing import Literal, NamedTuple, TypeAlias

from ds_shampoo.algorithm.selection import Role

# "vector" is all that takes the grafting step alone and is neither of the others.
AuxiliaryRole = Literal["embedding", "head", "vector"]
AUXILIARY_ROLES: tuple[AuxiliaryRole, ...] = ("embedding", "head", "vector")
# None for hidden matrices, whose settings are the param group's.
SettingsRole: TypeAlias = AuxiliaryRole | None

_NAMES = {
    "embedding": "embedding embeddings embed embeds emb wte token tokens embed_tokens word_embedding word_embeddings",
    "head": "head heads lm_head output outputs output_layer output_head unembed unembedding classifier",
    "vector": "vector vectors vec norm norms bias biases scalar scalars gain gains 1d one_d aux auxiliary",
}
_SETTINGS = {
    "lr_scale": "lr_scale lr lr_mult lr_multiplier lr_ratio lr_factor learning_rate learning_rate_scale",
    "betas": "betas beta beta1 beta2 adam_betas",
    "eps": "eps epsilon adam_eps",
    "weight_decay": "weight_decay wd decay weight_decay_mult weight_decay_scale wd_mult wd_scale",
}
_KEYS = tuple(f"{role}_{setting}" for role in _NAMES for setting in _SETTINGS)
# What others may call a role's key, as `embed_lr_mult` or `wd_head`.
ROLE_SYNONYMS = {
    spelling: f"{role}_{setting}"
    for role, names in _NAMES.items()
    for setting, settings in _SETTINGS.items()
    for name in names.split()
    for called in settings.split()
    for spelling in (f"{name}_{called}", f"{called}_{name}")
}
# A misspelt key is as like its own as this; other frameworks' `lr_scale` is like `head_lr_scale` by 0.76.
_ALIKE = 0.85


class RoleSettings(NamedTuple):
    """What the elementwise step of a role's parameters goes by."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def auxiliary_role(role: Role, preconditioned: bool) -> SettingsRole:
    """Whose elementwise settings a parameter has; None for those of hidden matrices, the param group's.

    An embedding or head is one whether it is preconditioned or not.
    """
    if role is Role.EMBEDDING:
        return "embedding"
    if role is Role.HEAD:
        return "head"
    return None if preconditioned else "vector"


def plain_spelling(key: str) -> str:
    """A key without what is a matter of taste."""
    return key.lower().replace("-", "_")


def resembles_a_key(key: str) -> bool:
    """Whether a key means one that is a role's, by another's name for it or misspelt."""
    plain = plain_spelling(key)
    return plain in ROLE_SYNONYMS or bool(difflib.get_close_matches(plain, _KEYS, n=1, cutoff=_ALIKE))
