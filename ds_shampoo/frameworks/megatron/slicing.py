"""How tensor parallelism slices a Megatron model's matrices, and where a fused one has to be cut.

A block is to be the same piece of the same matrix at any tensor-parallel size. So no block crosses the border of a
slice, nor one between the matrices that Megatron fuses: queries, keys and values of each query group (`linear_qkv`,
`linear_kv`), and gate and up projection (`linear_fc1` of a gated unit). With fewer query groups than ranks Megatron
gives each rank an equal run of all groups one after another, so that a slice's border falls within one: that cuts too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn

from ds_shampoo.algorithm.blocks import Section
from ds_shampoo.frameworks.megatron import internals
from ds_shampoo.parameters import marks


def sections(model: nn.Module, name: str, parameter: Tensor, *, rank: int, world_size: int) -> list[Section] | None:
    """The sections of the whole matrix, those of all tensor-parallel ranks.

    Args:
        model: the model that has the parameter under this name.
        rank, world_size: of this rank among the tensor-parallel ones.

    Returns:
        None for what is no matrix, or is whole on every rank.

    Raises:
        ValueError: if a fused matrix does not fit the attention settings of its layer.
    """
    shape, module = marks.whole_shape(parameter), _module_of(model, name)
    dim = _sliced_dim(module, parameter) if len(shape) == 2 else None
    if dim is None:
        return None
    size = shape[dim]
    groups = _groups(module, name, size * world_size)
    if groups is None:
        parts = _parts(module, name, parameter)
        length = size // parts
        runs = [
            _Run((part * world_size + holder) * length, length, holder, part * length)
            for holder in range(world_size)
            for part in range(parts)
        ]
    else:
        runs = list(_cut_at(size, groups))
    if sum(run.length for run in runs) != size * world_size:
        raise ValueError(f"parameter '{name}' of shape {shape} does not fit the attention settings of its layer")
    return [_section(shape, dim, run, rank) for run in runs]


class _Run(NamedTuple):
    """A part of a sliced dimension that one rank holds: where it begins in the whole, and where in the rank's slice."""

    origin: int
    length: int
    holder: int
    at: int


def _sliced_dim(module: nn.Module | None, parameter: Tensor) -> int | None:
    """The dimension that is sliced; by the layer's kind where Megatron, told not to initialise, left no mark."""
    marked = internals.sliced_dim(parameter)
    if marked is not None:
        return marked
    if isinstance(module, RowParallelLinear):
        return 1
    return 0 if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding) else None


def _parts(module: nn.Module | None, name: str, parameter: Tensor) -> int:
    """How many matrices are fused so that each is sliced by itself, a rank's slices of all of them lying together."""
    config: Any = getattr(module, "config", None)
    if _layer(name) == "linear_fc1" and config is not None and config.gated_linear_unit:
        return 2
    return internals.fused_matrices(parameter)


def _groups(module: nn.Module | None, name: str, size: int) -> list[int] | None:
    """The heights of queries, keys and values of every query group in a fused matrix of `size` rows, of all ranks."""
    config: Any = getattr(module, "config", None)
    if _layer(name) not in ("linear_qkv", "linear_kv") or config is None:
        return None
    head, groups = config.kv_channels, config.num_query_groups or config.num_attention_heads
    heights: list[int] = [head, head]
    if _layer(name) == "linear_qkv":
        queries = config.num_attention_heads // groups * head
        gate = [queries] if getattr(config, "attention_output_gate", False) else []
        heights = [queries, *gate, *heights]
    return heights * (size // sum(heights))


def _cut_at(size: int, lengths: Sequence[int]) -> Iterator[_Run]:
    """Consecutive lengths, cut at the multiples of `size` too."""
    start = 0
    for length in lengths:
        stop = start + length
        while start < stop:
            holder, at = divmod(start, size)
            end = min(stop, (holder + 1) * size)
            yield _Run(start, end - start, holder, at)
            start = end


def _layer(name: str) -> str:
    return name.rsplit(".", 2)[-2] if "." in name else ""


def _module_of(model: nn.Module, name: str) -> nn.Module | None:
    path, _, _ = name.rpartition(".")
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _section(shape: Sequence[int], dim: int, run: _Run, rank: int) -> Section:
    def at(value: int) -> tuple[int, ...]:
        return (value, 0) if dim == 0 else (0, value)

    extent = (run.length, shape[1]) if dim == 0 else (shape[0], run.length)
    return Section(at(run.origin), extent, at(run.at) if run.holder == rank else None)
