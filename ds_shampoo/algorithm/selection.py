"""Decides which parameters are preconditioned, by module type, by name and by what the user says."""

from __future__ import annotations

import enum
from collections.abc import Mapping

from torch import Tensor, nn

# Names under which models keep the matrix that maps to the vocabulary, as the last part before ".weight".
_HEAD_NAMES = frozenset({"lm_head", "output_layer", "embed_out", "unembed", "unembedding", "head", "decoder"})
_EMBEDDING_NAMES = frozenset(
    {
        "wte",
        "wpe",
        "embed_tokens",
        "tok_embeddings",
        "word_embeddings",
        "position_embeddings",
        "token_type_embeddings",
    }
)


class Role(enum.Enum):
    """What a parameter is, as far as preconditioning goes; the value is the reason shown at start."""

    WEIGHT = "weight"
    EMBEDDING = "embedding"
    HEAD = "output head"


def full_shape(parameter: Tensor) -> tuple[int, ...]:
    """A parameter's shape, also where ZeRO-3 has taken its elements away and left the shape in `ds_shape`."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def roles(model: nn.Module) -> dict[int, Role]:
    """The role of every parameter of a model, by `id(parameter)`.

    Embeddings are known by module type or by Megatron's `is_embedding_or_output_parameter`; heads by
    `get_output_embeddings()`, by that attribute, or by name. A head tied to an embedding is an embedding.
    """
    found = {id(p): name_role(name, p) for name, p in model.named_parameters(remove_duplicate=False)}
    get_output = getattr(model, "get_output_embeddings", None)
    output = get_output() if callable(get_output) else None
    if isinstance(output, nn.Module):
        found.update({id(p): Role.HEAD for p in output.parameters() if len(full_shape(p)) > 1})
    for module in model.modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            found[id(module.weight)] = Role.EMBEDDING
    return found


def name_role(name: str, parameter: Tensor) -> Role:
    """The role that a parameter's own attributes and name suggest, where no module is at hand."""
    parts = [part for part in name.split(".") if part != "weight"]
    leaf = parts[-1] if parts else ""
    if len(full_shape(parameter)) < 2:
        return Role.WEIGHT
    if leaf in _EMBEDDING_NAMES:
        return Role.EMBEDDING
    if leaf in _HEAD_NAMES or getattr(parameter, "is_embedding_or_output_parameter", False):
        return Role.HEAD
    return Role.WEIGHT


def names(model: nn.Module) -> Mapping[int, str]:
    """The first name of every parameter of a model, by `id(parameter)`."""
    return {id(parameter): name for name, parameter in model.named_parameters()}
