"""What Megatron does to gradients after the backward pass, where DeepSpeed is in charge of it."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from ds_shampoo.frameworks.megatron import internals

# The parameters whose gradients are summed already.
_summed = WeakTensorKeyDictionary()


def reduce_sequence_parallel_gradients(model: nn.Module) -> int:
    """Has the gradients of parameters that see a part of the sequence only summed over the tensor-parallel ranks.

    Under sequence parallelism every rank feeds norms and row-parallel biases, which all ranks hold, with its part of
    the sequence. Megatron's own loop sums their gradients (`finalize_model_grads`); under DeepSpeed nobody does, and
    the copies drift apart. Each parameter's gradient is summed as soon as a backward pass has it; a second call for
    the same parameter changes nothing.

    Returns:
        The number of parameters whose gradients are summed: 0 without sequence parallelism.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if dist.get_world_size(group) == 1:
        return 0
    partial = [p for p in model.parameters() if p.requires_grad and internals.sees_part_of_sequence(p)]

    def summed(gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    for parameter in partial:
        if parameter not in _summed:
            parameter.register_hook(summed)  # type: ignore[no-untyped-call]
            _summed[parameter] = True
    return len(partial)
