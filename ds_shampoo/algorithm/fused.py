"""Finds the matrices that models keep fused in one: queries, keys and values, or gate and up projection.

A fused matrix is known by its layer's name, and divided by the sizes that the module around it has as attributes: those
of Hugging Face's models, torch's, timm's and Megatron's kin. No library is asked for; see docs/algorithm.md, section 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ds_shampoo.algorithm.blocks import Parts
from ds_shampoo.algorithm.selection import PLAIN, Reader, lora_factor, plain_name

# Queries, keys and values; "in_proj" only where DeBERTa has it.
_QKV = frozenset(
    {
        *("c_attn", "Wqkv", "qkv_proj", "qkv", "qkv_linear", "to_qkv", "W_pack", "query_key_value", "in_proj_weight"),
        "in_proj",
    }
)
_KV = frozenset({"kv", "to_kv"})
# Gate and up projection, and the layer that follows them. It has half as many inputs as they have outputs together.
_GATED = {
    "gate_up_proj": "down_proj",
    "Wi": "Wo",  # ModernBERT
    "input_linear": "output_linear",  # Granite
    "weights_in": "weights_out",  # DINOv2
    "in_proj": "out_proj",  # Mamba: the state's inputs, and their gate
}
# Those of them that are nothing else in any model, so that they are known without the layer that follows.
_SURELY_GATED = frozenset({"gate_up_proj"})

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_HEAD_SIZE = ("head_dim", "head_size", "attention_head_size")


@dataclass(frozen=True, slots=True)
class _Layer:
    """What is known of the layer that a matrix is of.

    Attributes:
        name: the last part of its path.
        dims: of the matrix; of each of them, where it is a stack of experts.
        around: the module that it is in; None where no model is at hand.
        following: the dimensions of the layer that `_GATED` names; empty where there is none.
        by_columns: whether the matrix has a column for each output, as Hugging Face's Conv1D.
        stacked: whether it is one of several in a tensor.
    """

    name: str
    dims: tuple[int, int]
    around: nn.Module | None = None
    following: tuple[int, ...] = ()
    by_columns: bool = False
    stacked: bool = False


def parts(model: nn.Module, reader: Reader = PLAIN) -> dict[int, Parts]:
    """The parts of every fused matrix of a model, by `id(parameter)`; one part of each that has outputs for columns.

    The rows of a LoRA factor beside a fused layer (`lora_B`) divide as that layer's outputs do.
    """
    layers = _Layers.of(model, reader)
    found: dict[int, Parts] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(prefix=path, recurse=False):
            own = layers.parts(name, module, reader.shape_of(parameter))
            if own is not None:
                found[id(parameter)] = own
    return found


@dataclass(frozen=True, slots=True)
class _Layers:
    """All of a model, by paths that know nothing of wrappers and adapters.

    Attributes:
        modules: its modules.
        dims: of its layers' matrices, those of adapters apart.
    """

    modules: Mapping[str, nn.Module]
    dims: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, model: nn.Module, reader: Reader) -> _Layers:
        named = [(name, p) for name, p in model.named_parameters() if lora_factor(name) is None]
        return cls(
            {_layer_path(f"{path}.weight"): module for path, module in model.named_modules()},
            {_layer_path(name): _matrix(reader.shape_of(p)) for name, p in named},
        )

    def parts(self, name: str, module: nn.Module, shape: Sequence[int]) -> Parts | None:
        """Those of the parameter of this name, which `module` has."""
        matrix, factor = _matrix(shape), lora_factor(name)
        if len(matrix) != 2 or factor not in (None, "lora_B"):
            return None
        rows, columns = matrix
        path = _layer_path(name)
        holder, _, layer = path.rpartition(".")
        following = self.dims.get(f"{holder}.{_GATED[layer]}".lstrip("."), ()) if layer in _GATED else ()
        if factor is not None:  # it has its layer's outputs, and other inputs
            columns = next((dim for dim in self.dims.get(path, ()) if dim != rows), columns)
        own = _divided(
            _Layer(
                layer,
                (rows, columns),
                around=self.modules.get(holder),
                following=following,
                by_columns=factor is None and type(getattr(module, "nf", None)) is int,
                stacked=_is_stacked(shape),
            )
        )
        return own if own is None or factor is None else Parts(0, own.lengths)


def parts_by_name(name: str, shape: Sequence[int]) -> Parts | None:
    """What a name alone tells: where all parts are of one size, and lie one after another."""
    matrix, layer = _matrix(shape), _layer_path(name).rpartition(".")[2]
    if len(matrix) != 2 or _is_stacked(shape) or lora_factor(name) is not None:
        return None
    rows, columns = matrix
    return _divided(_Layer(layer, (rows, columns), by_columns=layer in _QKV and columns == 3 * rows))


def _layer_path(name: str) -> str:
    """`a.c_attn` for `a.c_attn.weight` and for what wraps it; `a.in_proj_weight` as it is."""
    return plain_name(name).removesuffix(".weight")


def _matrix(shape: Sequence[int]) -> tuple[int, ...]:
    """The last two of the dimensions above 1."""
    return tuple(dim for dim in shape if dim > 1)[-2:]


def _is_stacked(shape: Sequence[int]) -> bool:
    return sum(dim > 1 for dim in shape) > 2


def _divided(layer: _Layer) -> Parts | None:
    out = int(layer.by_columns)
    found: Parts | None = None
    if getattr(layer.around, "is_concatenated", True) is False:  # gate and up in turns, as gpt-oss has them
        return None
    if layer.name in _QKV and (layer.name != "in_proj" or hasattr(layer.around, "all_head_size")):
        lengths = _attention(layer, layer.dims[out])
        found = Parts(out, lengths) if lengths else None
    elif layer.name in _KV:
        found = _halves(out, layer.dims)
    elif layer.name in _GATED:
        found = _gated(layer)
    whole = Parts(1, (layer.dims[1],)) if layer.by_columns else None
    return found if found is not None and found.fit(layer.dims) else whole


def _gated(layer: _Layer) -> Parts | None:
    """Halves along the outputs: the layer that follows tells which dimension they are, of a stack of experts too."""
    if len(layer.following) == 2:
        rows, columns = layer.dims
        left, right = layer.following
        if (rows, columns) == (2 * right, left):
            return _halves(0, layer.dims)
        return _halves(1, layer.dims) if (columns, rows) == (2 * left, right) else None
    surely = layer.name in _SURELY_GATED and not layer.stacked
    return _halves(int(layer.by_columns), layer.dims) if surely else None


def _halves(dim: int, dims: Sequence[int]) -> Parts | None:
    half, odd = divmod(dims[dim], 2)
    return None if odd else Parts(dim, (half, half))


def _attention(layer: _Layer, length: int) -> tuple[int, ...]:
    """The lengths of queries, keys and values along the outputs, of which there are `length`; empty where unknown."""
    around = layer.around
    if (
        layer.name == "c_attn" and getattr(around, "is_cross_attention", False) is True
    ):  # GPT-2's, with keys and values alone
        return (length // 2,) * 2
    slices = _number(around, ("mp_num",))
    if slices:  # CodeGen's, as its first training sliced it
        return (length // (3 * slices),) * (3 * slices)
    inputs = layer.dims[1 - int(layer.by_columns)]
    heads = _query_heads(around, length, inputs)
    if heads is None:
        return (inputs,) * 3 if length == 3 * inputs and layer.name != "query_key_value" else ()
    queries, groups, size = heads
    if _head_by_head(layer):
        return (queries // groups * size, size, size) * groups
    return queries * size, groups * size, groups * size


def _query_heads(around: nn.Module | None, length: int, inputs: int) -> tuple[int, int, int] | None:
    """The number of query heads and of query groups, each with a head of keys and one of values, and a head's size.

    Where no size is told, queries are taken to have as many numbers as the layer has inputs, as they do in models that
    tell none. What is left of the outputs tells the number of groups, whatever the module calls it.
    """
    heads, size = _number(around, _HEADS), _number(around, _HEAD_SIZE)
    if not heads:
        return None
    if not size:
        size, odd = divmod(inputs, heads)
        if odd:
            return None
    groups, odd = divmod(length - heads * size, 2 * size)
    return (heads, groups, size) if groups > 0 and not odd and heads % groups == 0 else None


def _head_by_head(layer: _Layer) -> bool:
    """Whether each query group's queries, keys and values lie together."""
    if layer.name in ("query_key_value", "in_proj"):  # GPT-NeoX, BLOOM, Falcon, Persimmon; DeBERTa
        return True
    one_for_all = getattr(layer.around, "multi_query", None)  # GPTBigCode
    return (layer.name == "c_attn" and one_for_all is False) or hasattr(layer.around, "slope_rate")  # MiniMax


def _number(around: nn.Module | None, names: Sequence[str]) -> int:
    """The first of these attributes that the module has, or its config; 0 for none."""
    return next(_numbers(around, names), 0)


def _numbers(around: nn.Module | None, names: Sequence[str]) -> Iterator[int]:
    config = getattr(around, "config", None)
    for holder in (around, config):
        for name in names:
            value = holder.get(name) if isinstance(holder, Mapping) else getattr(holder, name, None)
            if type(value) is int and value > 0:
                yield value
