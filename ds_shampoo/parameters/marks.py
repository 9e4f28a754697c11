"""What model libraries write on their parameters for whatever optimizer comes, under any framework or none."""

from __future__ import annotations

from torch import Tensor

# Megatron's mark on the matrices over its vocabulary.
_EMBEDDING_OR_HEAD = "is_embedding_or_output_parameter"


def is_embedding_or_head(parameter: Tensor) -> bool:
    """Whether a model's library says that a parameter maps from or to the vocabulary."""
    return bool(getattr(parameter, _EMBEDDING_OR_HEAD, False))


def mark_embedding_or_head(parameter: Tensor) -> None:
    """Says so."""
    setattr(parameter, _EMBEDDING_OR_HEAD, True)
