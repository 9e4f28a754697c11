"""Megatron's expert parallelism, made known to DeepSpeed, which looks for its own mixture-of-experts layers only."""

from __future__ import annotations

from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from torch import nn

from ds_shampoo.frameworks.deepspeed.internals import enter_experts
from ds_shampoo.frameworks.megatron.internals import MEGATRON
from ds_shampoo.parameters import marks


def register_experts(model: nn.Module) -> int:
    """Tells DeepSpeed which ranks share which experts of a Megatron model, for its averages and its broadcasts.

    To be called before `deepspeed.initialize`; `ds_shampoo.initialize(..., mpu=mpu)` does it by itself. Megatron's
    groups are entered into DeepSpeed's registry under the name that groups of their size have there, and every
    parameter that Megatron marked as an expert's gets that name. Nothing changes where each rank has all
    experts.

    Returns:
        The number of parameters that other ranks hold others in place of.

    Raises:
        ValueError: if experts are sliced over another number of ranks than the rest of the model.
        SettingsError: if this Megatron has not what Shampoo needs of it.
    """
    MEGATRON.check()
    slices = parallel_state.get_tensor_model_parallel_world_size()
    own_slices = parallel_state.get_expert_tensor_parallel_world_size()
    if slices != own_slices and any(isinstance(module, BaseMoELayer) for module in model.modules()):
        raise ValueError(
            f"expert_tensor_parallel_size = {own_slices} at tensor_model_parallel_size = {slices}: Shampoo needs "
            "the same for both"
        )
    experts = [parameter for parameter in model.parameters() if marks.is_expert(parameter)]
    if not experts:
        return 0
    enter_experts(
        experts,
        parallel=parallel_state.get_expert_model_parallel_group(),
        replicas=parallel_state.get_expert_data_parallel_group(),
    )
    return len(experts)
