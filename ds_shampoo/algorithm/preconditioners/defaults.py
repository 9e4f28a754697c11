"""What settings come to where nobody sets them: what belongs to a preconditioner comes with it."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# The word for a direction as long as its block's grafting step.
GRAFTING = "grafting"

_SHAMPOOS: dict[str, Any] = {
    "embedding_lr_scale": 1.0,
    "betas": (0.95, 0.95),
    "direction_rms": GRAFTING,
    "statistics_of": "gradients",
    "statistics_beta": 0.5,
    "root_interval": 10,
    "matmul_precision": "highest",
}
# 0.2 is the root mean square of Adam's usual step (Liu et al., "Muon is Scalable for LLM Training", arXiv 2502.16982).
_ORTHOGONALS = {**_SHAMPOOS, "direction_rms": 0.2, "statistics_beta": 0.95}
# Roots of the noise are worth most while that noise is still in the momentum: docs/directions.md has every interval.
# Products in bfloat16 are Muon's too, and cost nothing in loss there. The length lets an AdamW's rate serve: twice what
# Muon's large jobs take beside that, and less than half of what is best in short runs.
_POLARS = {
    **_ORTHOGONALS,
    "direction_rms": 0.4,
    # Adam's rate for all is what matrices bear; embeddings bear far more (docs/directions.md), and here it is theirs.
    "embedding_lr_scale": 4.0,
    "betas": (0.9, 0.95),
    "statistics_of": "differences",
    "root_interval": 3,
    "matmul_precision": "medium",
}

DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "shampoo": MappingProxyType(_SHAMPOOS),
        "spectral": MappingProxyType({**_ORTHOGONALS, "root_interval": 50}),
        "polar": MappingProxyType(_POLARS),
    }
)
# The one that a job has where it names none.
USUAL = "polar"
# The settings that a preconditioner has defaults for.
LEFT_OPEN = frozenset(_SHAMPOOS)
# The most steps from a root's statistics to its use where `root_delay` is not set.
_LONGEST_DELAYS = {"spectral": 5}


def filled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, and for those of `LEFT_OPEN` that are missing or None their preconditioner's own.

    A preconditioner that nobody knows is left to whoever checks the settings.
    """
    name = settings.get("preconditioner", USUAL)
    own = DEFAULTS.get(name, _SHAMPOOS) if isinstance(name, str) else _SHAMPOOS
    return {**settings, **{key: value for key, value in own.items() if settings.get(key) is None}}


def usual_delay(preconditioner: str, root_interval: int) -> int:
    """Steps from a root's statistics to its use: half of the interval, rounded up; under "spectral" 5 at most."""
    half = (root_interval + 1) // 2
    return min(half, _LONGEST_DELAYS.get(preconditioner, half))
