"""How tensor parallelism slices a Megatron model's matrices, and where a fused one has to be cut.

A block is to be the same piece of the same matrix at any tensor-parallel size. So no block crosses the border of a
slice, nor one between the matrices that Megatron fuses: queries, keys and values of each query group (`linear_qkv`,
`linear_kv`), and gate and up projection (`linear_fc1` of a gated unit).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn

from ds_shampoo.algorithm.blocks import Section
from ds_shampoo.algorithm.selection import full_shape


def sections(model: nn.Module, name: str, parameter: Tensor, rank: int, world_size: int) -> list[Section] | None:
    """The sections of the whole matrix, those of all tensor-parallel ranks.

    Args:
        model: the model that has the parameter under this name.
        rank, world_size: of this rank among the tensor-parallel ones.

    Returns:
        None for what is no matrix, or is whole on every rank.

    Raises:
        ValueError: if a fused matrix does not fit the attention settings of its layer.
    """
    shape, module = full_shape(parameter), _module_of(model, name)
    dim = _sliced_dim(module, parameter) if len(shape) == 2 else None
    if dim is None:
        return None
    runs = list(_runs(module, name, parameter, shape[dim]))
    if sum(length for _, length in runs) != shape[dim]:
        raise ValueError(f"parameter '{name}' of shape {shape} does not fit the attention settings of its layer")
    found = []
    for holder in range(world_size):
        at = 0
        for stride, length in runs:
            origin = at * world_size + holder * length if stride else holder * shape[dim] + at
            found.append(_section(shape, dim, origin, length, at if holder == rank else None))
            at += length
    return found


def _sliced_dim(module: nn.Module | None, parameter: Tensor) -> int | None:
    """The dimension that is sliced; by the layer's kind where Megatron, told not to initialise, left no mark."""
    if getattr(parameter, "tensor_model_parallel", False):
        return int(parameter.partition_dim)  # type: ignore[attr-defined]
    if isinstance(module, RowParallelLinear):
        return 1
    return 0 if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding) else None


def _runs(module: nn.Module | None, name: str, parameter: Tensor, size: int) -> Iterator[tuple[bool, int]]:
    """The parts of a slice in order: whether all ranks' slices of that part are neighbours, and its length."""
    config: Any = getattr(module, "config", None)
    layer = name.rsplit(".", 2)[-2] if "." in name else ""
    parts = int(getattr(parameter, "partition_stride", 1))
    if layer == "linear_fc1" and config is not None and config.gated_linear_unit:
        parts = 2
    if layer in ("linear_qkv", "linear_kv") and config is not None:
        yield from ((False, length) for length in _per_group(config, layer, size))
    else:
        yield from ((parts > 1, size // parts) for _ in range(parts))


def _per_group(config: Any, layer: str, size: int) -> Iterator[int]:
    """The heights of queries, keys and values of every query group in a slice of `size` rows."""
    head, groups = config.kv_channels, config.num_query_groups or config.num_attention_heads
    queries = config.num_attention_heads // groups
    heights = [head, head]
    if layer == "linear_qkv":
        gate = [queries * head] if getattr(config, "attention_output_gate", False) else []
        heights = [queries * head, *gate, *heights]
    for _ in range(size // sum(heights)):
        yield from heights


def _module_of(model: nn.Module, name: str) -> nn.Module | None:
    path, _, _ = name.rpartition(".")
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _section(shape: Sequence[int], dim: int, origin: int, length: int, local: int | None) -> Section:
    def at(value: int) -> tuple[int, ...]:
        return (value, 0) if dim == 0 else (0, value)

    extent = (length, shape[1]) if dim == 0 else (shape[0], length)
    return Section(at(origin), extent, None if local is None else at(local))
