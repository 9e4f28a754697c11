"""What model libraries write on their parameters for whoever trains them, under any framework or none."""

from __future__ import annotations

from torch import Tensor

# Megatron's, on matrices that map from or to the vocabulary.
EMBEDDING_OR_HEAD = "is_embedding_or_output_parameter"
# DeepSpeed's and Megatron's: false on what not all data-parallel ranks share.
EXPERT = "allreduce"


def is_embedding_or_head(parameter: Tensor) -> bool:
    """Whether a model's library says that a parameter maps from or to the vocabulary."""
    return bool(getattr(parameter, EMBEDDING_OR_HEAD, False))


def mark_embedding_or_head(parameter: Tensor) -> None:
    """Says so."""
    setattr(parameter, EMBEDDING_OR_HEAD, True)


def is_expert(parameter: Tensor) -> bool:
    """Whether ranks hold others in a parameter's place, as under expert parallelism."""
    return not getattr(parameter, EXPERT, True)
