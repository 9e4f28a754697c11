"""Megatron's `parallel_state` as DeepSpeed's `mpu`, to be passed as `ds_shampoo.initialize(..., mpu=mpu)`.

What DeepSpeed asks for and Megatron does not have is defined here; everything else is Megatron's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from ds_shampoo.algorithm.blocks import Section
from ds_shampoo.frameworks.megatron.internals import MEGATRON
from ds_shampoo.frameworks.megatron.slicing import sections
from ds_shampoo.frameworks.megatron_deepspeed.experts import register_experts
from ds_shampoo.frameworks.megatron_deepspeed.gradients import reduce_sequence_parallel_gradients


def get_model_parallel_world_size() -> int:
    """The number of ranks that hold one replica of the model together."""
    return dist.get_world_size(parallel_state.get_model_parallel_group())


def get_model_parallel_rank() -> int:
    """This rank's number among them."""
    return dist.get_rank(parallel_state.get_model_parallel_group())


def get_data_parallel_group_ranks() -> list[int]:
    """The global ranks of the data-parallel group."""
    return list(dist.get_process_group_ranks(parallel_state.get_data_parallel_group()))


def shampoo_sections(model: nn.Module, name: str, parameter: Tensor) -> Sequence[Section] | None:
    """How a parameter of the model is sliced; Shampoo asks for it under this name.

    Raises:
        ValueError: if the parameter's shape does not fit the rule.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    return sections(
        model,
        name,
        parameter,
        rank=dist.get_rank(group),
        world_size=dist.get_world_size(group),
    )


def shampoo_register(model: nn.Module) -> None:
    """What DeepSpeed has to know of a Megatron model before it takes it; `ds_shampoo.initialize` calls it.

    Raises:
        ValueError: as `register_experts`.
    """
    register_experts(model)


def shampoo_prepare(model: nn.Module) -> None:
    """What a Megatron model needs under DeepSpeed before it is trained; Shampoo calls it as it is set up.

    Raises:
        SettingsError: if this Megatron has not what Shampoo needs of it.
    """
    MEGATRON.check()
    reduce_sequence_parallel_gradients(model)


def __getattr__(name: str) -> Any:
    return getattr(parallel_state, name)
