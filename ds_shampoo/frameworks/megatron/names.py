"""Names of a Megatron model's parameters that are the same however the model is spread over ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from megatron.core import parallel_state
from torch import Tensor, nn

from ds_shampoo.frameworks.megatron import internals
from ds_shampoo.parameters import marks
from ds_shampoo.sharding.expert_names import expert_name


class ModelParameter(NamedTuple):
    """Where a parameter is found on this rank, and what it is called on all.

    Attributes:
        name: the same at any pipeline and expert parallel size, layers and experts numbered over all ranks.
        chunk: the part of the model that has it.
        local_name: its name there.
    """

    name: str
    chunk: nn.Module
    local_name: str


def model_parameters(chunks: Sequence[nn.Module]) -> Mapping[int, ModelParameter]:
    """Every parameter of this rank's parts of the model, by `id(parameter)`.

    Raises:
        ValueError: for an expert's parameter whose name does not tell which expert's.
    """
    found: dict[int, ModelParameter] = {}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            whole_name = _whole_model_name(chunk, name, parameter)
            found.setdefault(id(parameter), ModelParameter(whole_name, chunk, name))
    return found


def _whole_model_name(chunk: nn.Module, name: str, parameter: Tensor) -> str:
    joined = ".".join(_numbered_over_stages(chunk, name.split(".")))
    while joined.startswith("module."):  # DistributedDataParallel and Float16Module
        joined = joined.removeprefix("module.")
    return _numbered_over_experts(chunk, joined) if marks.is_expert(parameter) else joined


def _numbered_over_stages(chunk: nn.Module, parts: Sequence[str]) -> Iterator[str]:
    """A layer's own number counts from 1 over all pipeline stages; its place in the list from 0 on this one."""
    module: Any = chunk
    before = ""
    for part in parts:
        module = getattr(module, part, None)
        number = internals.number_over_stages(module)
        yield str(number - 1) if before == "layers" and number is not None else part
        before = part


def _numbered_over_experts(chunk: nn.Module, name: str) -> str:
    found = expert_name(name)
    if found is None:
        raise ValueError(
            f"parameter '{name}' is an expert's, but its name does not tell which expert's: Shampoo knows "
            "SequentialMLP and TEGroupedMLP"
        )
    config: Any = next(module.config for module in chunk.modules() if hasattr(module, "config"))
    here = config.num_moe_experts // parallel_state.get_expert_model_parallel_world_size()
    return str(found.numbered_from(here * parallel_state.get_expert_model_parallel_rank()))
