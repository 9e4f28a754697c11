"""Decides what a parameter is, by the modules and names around it: its role, and how many matrices it holds."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeGuard

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

# Names under which models keep the matrix that maps to the vocabulary or to classes, as the last part before ".weight".
_HEAD_NAMES = frozenset(
    {
        *("lm_head", "output_layer", "embed_out", "unembed", "unembedding", "head", "decoder"),
        *("classifier", "score", "qa_outputs"),
    }
)
# Those of them that may be modules of several layers, the last of which is then the head. A "decoder" never is.
_NESTED_HEADS = frozenset({"lm_head", "head", "classifier", "score", "qa_outputs"})
# The name of torchvision's class heads, at the top of a model; deeper down it is any layer's.
_TOP_HEAD = "fc"
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
# Tables that state-space and RWKV layers multiply elementwise: no product ever mixes their rows or columns.
_ELEMENTWISE_NAMES = frozenset({"A_log", "A_logs", "D", "Ds", "dt_bias", "time_decay", "time_first", "time_faaaa"})
_EXPERTS = "experts"

# Parts of a path that stand for the module below or above them: torch's and DeepSpeed's wrappers, and PEFT's.
_WRAPPER = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|base_layer|original_module"
    r"|modules_to_save\.[^.]+)\.(?=.)"
)
_PARAMETRIZED = re.compile(r"parametrizations\.([^.]+)\.original\d*$")
_OLD_PARAMETRIZED = re.compile(r"(?<=\.)(\w+)_(?:g|v|orig)$")
_LORA = re.compile(r"\.(?P<factor>lora_(?:embedding_)?[AB])(?:\.[^.]+)?(?:\.weight)?$")
# Which dimension of a LoRA factor beside an embedding or a head runs over the vocabulary.
_VOCABULARY_OF_LORA = {"lora_embedding_A": -1, "lora_embedding_B": None, "lora_A": None, "lora_B": 0}
# And which one runs over the rank, of any.
_RANK_OF_LORA = {"lora_embedding_A": 0, "lora_embedding_B": -1, "lora_A": 0, "lora_B": -1}


class Role(enum.Enum):
    """What a parameter is, as far as preconditioning goes; the value is the reason shown at start."""

    WEIGHT = "weight"
    EMBEDDING = "embedding"
    HEAD = "output head"
    ELEMENTWISE = "used elementwise"
    DEPTHWISE = "depthwise convolution"
    LORA = "LoRA factor"
    NONE = 'role "none"'


@dataclass(frozen=True, slots=True)
class Kind:
    """What a parameter is.

    Attributes:
        role: weight, LoRA factor, embedding, head, or why it is never preconditioned.
        vocabulary_dim: of an embedding or head, the dimension over the vocabulary: 0, -1, or None for neither.
        batch: so many independent matrices lie one after another in it.
        rank_dim: of a LoRA factor, the dimension over the rank: 0 or -1; None for anything else.
    """

    role: Role = Role.WEIGHT
    vocabulary_dim: int | None = 0
    batch: int = 1
    rank_dim: int | None = None


_Members: TypeAlias = Sequence[tuple[str, Tensor]]


def _own_shape(parameter: Tensor) -> tuple[int, ...]:
    return tuple(parameter.shape)


def _unmarked(_: Tensor) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Reader:
    """How to read from a parameter what a framework did to it, or wrote on it; the default is a plain tensor's.

    Attributes:
        shape_of: gives a parameter's full shape, wherever its elements are.
        marked_as_head: whether someone wrote on a parameter that it is an embedding's or an output head's.
        marked_as_embedding: whether someone wrote on it that it is an embedding, or a copy of one.
    """

    shape_of: Callable[[Tensor], tuple[int, ...]] = _own_shape
    marked_as_head: Callable[[Tensor], bool] = _unmarked
    marked_as_embedding: Callable[[Tensor], bool] = _unmarked


PLAIN = Reader()


def plain_name(name: str) -> str:
    """The name of the tensor that a parameter stands for: what wrappers, parametrisations and adapters put in is gone.

    `lm_head.parametrizations.weight.original1`, `lm_head.modules_to_save.default.weight` and
    `lm_head.lora_B.default.weight` all are `lm_head.weight`.
    """
    name = _WRAPPER.sub("", name)
    name = _LORA.sub(".weight", name)
    return _OLD_PARAMETRIZED.sub(r"\1", _PARAMETRIZED.sub(r"\1", name))


def lora_factor(name: str) -> str | None:
    """Which of LoRA's factors a parameter is, as PEFT names them: "lora_A", say; None for anything else."""
    found = _LORA.search(name)
    return found["factor"] if found else None


def kinds(model: nn.Module, reader: Reader = PLAIN) -> dict[int, Kind]:
    """What every parameter of a model is, by `id(parameter)`.

    Embeddings are known by module type or by name; heads by `get_output_embeddings()`, by a mark that the reader
    knows, or by name; depthwise convolutions by their `groups`. What wraps
    such a module, adapts it or stands for its weight has its role. A head tied to an embedding is an embedding.
    """
    members = list(model.named_parameters(remove_duplicate=False))
    found = {id(p): name_kind(name, p, reader) for name, p in members}
    for role, modules in _modules_by_role(model, members, reader):
        for name, p in members:
            if len(reader.shape_of(p)) > 1 and not modules.isdisjoint(_ancestors(plain_name(name))):
                found[id(p)] = replace(found[id(p)], role=role)
    for module_name, module in model.named_modules():
        own = list(module.named_parameters(prefix=module_name, recurse=False))
        for parameter, batch in _stacked_experts(module_name, module, own, reader):
            found[id(parameter)] = replace(found[id(parameter)], batch=batch)
    return found


def roles(model: nn.Module, reader: Reader = PLAIN) -> dict[int, Role]:
    """The role of every parameter of a model, by `id(parameter)`; see `kinds`."""
    return {number: kind.role for number, kind in kinds(model, reader).items()}


def name_kind(name: str, parameter: Tensor, reader: Reader = PLAIN) -> Kind:
    """What a parameter's own attributes and name suggest, where no module is at hand."""
    shape, lora = reader.shape_of(parameter), lora_factor(name)
    parts = plain_name(name).split(".")
    held_by = parts[-2] if len(parts) > 1 else ""
    leaf = parts[-1]
    fused = held_by == _EXPERTS and not leaf.isdecimal() and len(shape) > (1 if leaf.endswith("bias") else 2)
    role = _name_role(parts, parameter, reader)
    return Kind(
        Role.LORA if lora and role is Role.WEIGHT and len(shape) > 1 else role,
        _VOCABULARY_OF_LORA[lora] if lora else 0,
        shape[0] if fused else 1,
        _RANK_OF_LORA[lora] if lora else None,
    )


def names(model: nn.Module) -> Mapping[int, str]:
    """The first name of every parameter of a model, by `id(parameter)`."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def aliases(model: nn.Module) -> Mapping[int, tuple[str, ...]]:
    """All names of every parameter of a model, several of which are tied ones', by `id(parameter)`."""
    found: dict[int, tuple[str, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found[id(parameter)] = (*found.get(id(parameter), ()), name)
    return found


def _name_role(parts: Sequence[str], parameter: Tensor, reader: Reader) -> Role:
    path = [part for part in parts if part != "weight"]
    leaf = path[-1] if path else ""
    if len(reader.shape_of(parameter)) < 2:
        return Role.WEIGHT
    if parts[-1] in _ELEMENTWISE_NAMES:  # not `D.weight`, a layer's
        return Role.ELEMENTWISE
    if leaf in _EMBEDDING_NAMES or reader.marked_as_embedding(parameter):
        return Role.EMBEDDING
    head = leaf in _HEAD_NAMES or path == [_TOP_HEAD] or reader.marked_as_head(parameter)
    return Role.HEAD if head else Role.WEIGHT


def _modules_by_role(model: nn.Module, members: _Members, reader: Reader) -> Iterator[tuple[Role, set[str]]]:
    """The plain paths of a model's modules that have a role; one that comes later overrules."""
    yield Role.HEAD, _nested_heads(members, reader)
    outputs = {id(module.get_output_embeddings()) for module in model.modules() if _may_have_a_head(module)}
    yield Role.HEAD, set(_paths(model, lambda module: id(module) in outputs))
    yield Role.EMBEDDING, set(_paths(model, lambda module: isinstance(module, nn.Embedding | nn.EmbeddingBag)))
    yield Role.DEPTHWISE, set(_paths(model, _is_depthwise))


def _paths(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> Iterator[str]:
    for path, module in model.named_modules(remove_duplicate=False):
        if wanted(module):
            yield _module_path(plain_name(f"{path}.weight"))


def _may_have_a_head(module: nn.Module) -> TypeGuard[Any]:
    return callable(getattr(module, "get_output_embeddings", None))


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, _ConvNd) and 1 < module.groups == module.in_channels


def _nested_heads(members: _Members, reader: Reader) -> set[str]:
    """The last layer with a matrix of every module that is named as a head."""
    last: dict[str, str] = {}
    for name, parameter in members:
        path = _module_path(plain_name(name))
        if len(reader.shape_of(parameter)) > 1:
            last.update((outer, path) for outer in _ancestors(path) if outer.rpartition(".")[2] in _NESTED_HEADS)
    return set(last.values())


def _stacked_experts(path: str, module: nn.Module, own: _Members, reader: Reader) -> Iterator[tuple[Tensor, int]]:
    """A module's own parameters that hold a matrix, or a vector, for each of several experts, and how many.

    They are numbered by the first dimension, by which the module's name (`experts`) or an attribute of it
    (`num_experts`) tells them; or, below a module of that name, each expert has as many rows of a matrix (DBRX's).
    """
    shapes = {id(p): reader.shape_of(p) for _, p in own}
    if isinstance(module, _ConvNd | nn.ParameterList | nn.ParameterDict):  # whatever its name
        yield from ((p, 1) for _, p in own)
        return
    counts = {n for key, n in vars(module).items() if key.endswith(_EXPERTS) and type(n) is int and n > 1}
    path = _module_path(plain_name(f"{path}.weight"))
    named = path.rpartition(".")[2] == _EXPERTS
    found = {shape[0] for shape in shapes.values() if len(shape) > 2 and (named or shape[0] in counts)}
    if found:
        yield from ((p, shapes[id(p)][0]) for _, p in own if len(shapes[id(p)]) > 1 and shapes[id(p)][0] in found)
    elif _EXPERTS in path.split("."):
        matrices = [p for _, p in own if len(shapes[id(p)]) == 2]
        for count in counts:
            if matrices and all(shapes[id(p)][0] > count and shapes[id(p)][0] % count == 0 for p in matrices):
                yield from ((p, count) for p in matrices)


def _ancestors(path: str) -> Iterator[str]:
    """A dotted path and all that it lies in."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _module_path(name: str) -> str:
    return name.rpartition(".")[0]
