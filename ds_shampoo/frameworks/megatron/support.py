"""What Shampoo is told by Megatron's configuration, and under which of its features it does not run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from ds_shampoo.algorithm import grafting
from ds_shampoo.config import SettingsError, ShampooConfig, parse
from ds_shampoo.frameworks.megatron import internals
from ds_shampoo.frameworks.megatron.internals import MEGATRON

# What Megatron's own configuration says.
_MEGATRONS = {
    "lr": "config.lr",
    "weight_decay": "config.weight_decay",
    "decoupled_weight_decay": "config.decoupled_weight_decay",
}


def checked(config: OptimizerConfig, settings: Mapping[str, Any]) -> ShampooConfig:
    """Shampoo's settings, with what Megatron's configuration says of them.

    Raises:
        SettingsError: for a setting that is wrong, or that Megatron's configuration has.
    """
    for key, place in _MEGATRONS.items():
        if key in settings:
            raise SettingsError(f"Shampoo setting '{key}' = {settings[key]!r}: under Megatron set {place}")
    megatrons = {key: getattr(config, key) for key in _MEGATRONS}
    if megatrons["lr"] is None:
        raise SettingsError("config.lr = None: Shampoo needs a learning rate, Adam's")
    return parse({**settings, **{key: value for key, value in megatrons.items() if value is not None}})


def refuse_unsupported(
    config: OptimizerConfig,
    chunks: Sequence[Any],
    groups: ProcessGroupCollection,
    *,
    shampoo: ShampooConfig,
    layer_wise: bool,
) -> None:
    """Refuses by name what Shampoo does not run under, before anything is built.

    Raises:
        SettingsError: naming the first such feature, or what this Megatron has otherwise than Shampoo needs it.
    """
    MEGATRON.check()
    ddp = internals.data_parallelism(chunks[0])
    refusals = (
        (config.optimizer_cpu_offload, "config.optimizer_cpu_offload = True"),
        (config.use_precision_aware_optimizer, "config.use_precision_aware_optimizer = True"),
        (config.overlap_param_gather_with_optimizer_step, "config.overlap_param_gather_with_optimizer_step = True"),
        (ddp.use_megatron_fsdp, "ddp_config.use_megatron_fsdp = True"),
        (ddp.num_distributed_optimizer_instances > 1, "ddp_config.num_distributed_optimizer_instances > 1"),
        (
            layer_wise and config.use_distributed_optimizer,
            "layer_wise_distributed_optimizer = True with config.use_distributed_optimizer = True",
        ),
        (layer_wise and config.fp16, "layer_wise_distributed_optimizer = True with config.fp16 = True"),
        (
            grafting.is_normalized(shampoo.grafting) and dist.get_world_size(groups.tp) > 1,
            f"grafting = '{shampoo.grafting}' under tensor parallelism, where norms would be those of slices",
        ),
        (
            shampoo.embedding != "diagonal"
            and dist.get_world_size(groups.pp) > 1
            and any(internals.shares_embedding(module) for module in _modules(chunks)),
            f"embedding = '{shampoo.embedding}' for an embedding of which two pipeline stages hold a copy",
        ),
    )
    for refused, what in refusals:
        if refused:
            raise SettingsError(f"{what}: Shampoo does not run there; see docs/megatron.md")


def _modules(chunks: Sequence[nn.Module]) -> Iterator[nn.Module]:
    for chunk in chunks:
        yield from chunk.modules()
