"""Megatron's process groups, in workers that live through many jobs."""

from __future__ import annotations

import gc
from typing import Any


def initialize(**sizes: Any) -> None:
    """Megatron's groups, by `initialize_model_parallel`'s own arguments, in place of those of the last job.

    Megatron forgets its groups without ending them. Each one has threads that wake up a hundred times a second: after
    some dozens of jobs they leave the machine no time for anything else.
    """
    from megatron.core import parallel_state

    _end_former()
    gc.collect()  # the last job's model and engine hold them still, in circles
    parallel_state.initialize_model_parallel(**sizes)


def _end_former() -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state

    former = [group for group in parallel_state._global_process_group_list or [] if group is not None]
    parallel_state.destroy_model_parallel()
    for group in former:
        if group in dist.distributed_c10d._world.pg_map:  # some it does end
            dist.destroy_process_group(group)
