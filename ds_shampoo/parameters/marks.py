"""What frameworks and model libraries write on parameters for whoever trains them, whatever lays them out."""

from __future__ import annotations

from torch import Tensor

# Megatron's, on matrices that map from or to the vocabulary.
EMBEDDING_OR_HEAD = "is_embedding_or_output_parameter"
# Megatron's, on an embedding of which another pipeline stage has a copy as its output layer, and on that copy.
SHARED_EMBEDDING = "shared_embedding"
# ZeRO-3's, on what it has taken the elements of; that may be before there is an engine.
WHOLE_SHAPE = "ds_shape"
# DeepSpeed's and Megatron's: false on what not all data-parallel ranks share.
EXPERT = "allreduce"


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """A parameter's shape on this rank, also where its elements have been taken away."""
    return tuple(getattr(parameter, WHOLE_SHAPE, parameter.shape))


def is_embedding_or_head(parameter: Tensor) -> bool:
    """Whether a model's library says that a parameter maps from or to the vocabulary."""
    return bool(getattr(parameter, EMBEDDING_OR_HEAD, False))


def is_shared_embedding(parameter: Tensor) -> bool:
    """Whether a parameter is an embedding, by whatever name, that several pipeline stages step alike."""
    return bool(getattr(parameter, SHARED_EMBEDDING, False))


def mark_embedding_or_head(parameter: Tensor) -> None:
    """Says so."""
    setattr(parameter, EMBEDDING_OR_HEAD, True)


def is_expert(parameter: Tensor) -> bool:
    """Whether ranks hold others in a parameter's place, as under expert parallelism."""
    return not getattr(parameter, EXPERT, True)
