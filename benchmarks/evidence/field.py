"""The optimizers that are compared, and what of each is tuned.

All but ds-shampoo's own are `optimizers.ByRole`: one AdamW with rates by role steps what is no hidden matrix, and
ds-shampoo has the same keys for the same roles. A search begins with the first axis.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.evidence.protocol import Contender
from benchmarks.evidence.search import Axis, Value

RATE = Axis("lr", tuple(1e-3 * 2.0**power for power in range(-3, 8)))
BY_ROLE = (
    Axis("embedding_lr_scale", (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)),
    Axis("head_lr_scale", (0.125, 0.25, 0.5, 1.0, 2.0)),
    Axis("vector_lr_scale", (0.25, 0.5, 1.0, 2.0, 4.0)),
)
SECOND_BETA = Axis("betas.1", (0.9, 0.95, 0.98, 0.99))
WARMUP = Axis("scheduler.warmup_num_steps", (0.05, 0.1, 0.2, 0.3))
DECAY = Axis("weight_decay", (0.0, 0.01, 0.03, 0.1, 0.3))
EPS = Axis("eps", (1e-12, 1e-10, 1e-8, 1e-6))

_MOMENTA = (0.8, 0.85, 0.9, 0.95, 0.975)
MOMENTUM = Axis("momentum", _MOMENTA)
MOMENTUM_WARMUP = Axis("momentum_warmup", (0.0, 0.1, 0.2, 0.4))
FIRST_BETA = Axis("betas.0", _MOMENTA)

_COMMON: dict[str, Value] = {
    "weight_decay": 0.01,
    "betas.0": 0.9,
    "betas.1": 0.95,
    "eps": 1e-8,
    "scheduler.warmup_num_steps": 0.2,
}
# Where tuned Muons have them, modded-nanogpt's optimization track and trials on byte GPTs: embeddings high, heads low.
_ROLES: dict[str, Value] = {"embedding_lr_scale": 4.0, "head_lr_scale": 0.5, "vector_lr_scale": 1.0}
_LAST = (SECOND_BETA, WARMUP, DECAY, EPS)

MUON = Contender(
    "Muon",
    "TorchMuon",
    {**_COMMON, **_ROLES, "lr": 16e-3, "momentum": 0.9, "momentum_warmup": 0.2},
    (RATE, MOMENTUM, *BY_ROLE, MOMENTUM_WARMUP, *_LAST),
)

# As jobs have it: one rate for all.
ADAMW = Contender(
    "AdamW",
    "AdamWByRole",
    {**_COMMON, "lr": 2e-3, "embedding_lr_scale": 1.0, "head_lr_scale": 1.0, "vector_lr_scale": 1.0},
    (RATE, FIRST_BETA, *_LAST),
)

# Matrices at the rate that is best for all, and for the others what is best beside Muon's.
ADAMW_BY_ROLE = Contender(
    "AdamW by role",
    "AdamWByRole",
    {**ADAMW.settings, "embedding_lr_scale": 16.0, "head_lr_scale": 2.0, "vector_lr_scale": 4.0},
    (RATE, FIRST_BETA, *BY_ROLE, *_LAST),
)

SOAP = Contender(
    "SOAP",
    "benchmarks.prototypes:Soap",
    {**_COMMON, **_ROLES, "lr": 4e-3, "momentum": 0.95, "momentum_warmup": 0.0, "statistics_beta": 0.95},
    (RATE, MOMENTUM, *BY_ROLE, Axis("statistics_beta", (0.9, 0.95, 0.98)), *_LAST),
)

FACEBOOK = Contender(
    "Facebook's Shampoo",
    "benchmarks.prototypes:FacebookShampoo",
    {**_COMMON, **_ROLES, "lr": 4e-3, "momentum": 0.9, "momentum_warmup": 0.0, "root_interval": 5},
    (RATE, Axis("root_interval", (1, 5)), MOMENTUM, *BY_ROLE, *_LAST),
)

# One default for all tasks; blocks as wide as the models, as the others have whole matrices.
SHAMPOO = Contender(
    "Shampoo",
    "Shampoo",
    {**_COMMON, **_ROLES, "lr": 4e-3, "betas.0": 0.95, "block_size": 1024},
    (RATE, FIRST_BETA, *BY_ROLE, *_LAST),
)

# What belongs to the preconditioner are its own defaults, but for what all tune. Its steps are twice Muon's at a rate.
POLAR = Contender(
    "Polar",
    "Shampoo",
    {
        **SHAMPOO.settings,
        "lr": 4e-3,
        "embedding_lr_scale": 8.0,
        "head_lr_scale": 1.0,
        "vector_lr_scale": 2.0,
        "betas.0": 0.9,
        "momentum_warmup_steps": 0.2,
        "preconditioner": "polar",
    },
    (RATE, FIRST_BETA, *BY_ROLE, replace(MOMENTUM_WARMUP, key="momentum_warmup_steps"), *_LAST),
)

# Nothing tuned: an AdamW's JSON with another `type`.
UNTUNED = Contender("Polar with AdamW's JSON", "Shampoo", {}, json_of=ADAMW.name)


def at(contender: Contender, lr: float, **settings: Value) -> Contender:
    """A contender whose search begins at another rate, and with other settings."""
    return replace(contender, settings={**contender.settings, "lr": lr, **settings})
