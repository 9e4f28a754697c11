"""Shampoo in the registry by which newer releases of Megatron find the optimizer that `config.optimizer` names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from ds_shampoo.config import SettingsError, ShampooConfig, parse
from ds_shampoo.frameworks.megatron import internals
from ds_shampoo.frameworks.megatron.checkpoint import KEY, apart, load_sharded_blocks, sharded_blocks
from ds_shampoo.frameworks.megatron.inner import InnerShampoo, named, prepare
from ds_shampoo.frameworks.megatron.internals import MEGATRON
from ds_shampoo.frameworks.megatron.layout import MegatronLayout
from ds_shampoo.frameworks.megatron.names import model_parameters
from ds_shampoo.frameworks.megatron.support import checked, refuse_unsupported


class RegisteredShampoo(InnerShampoo):
    """Shampoo as Megatron makes it from an entry of its registry, and wraps it up afterwards.

    The blocks are in its own state: the wrappers give dist_checkpointing what they don't know of one as it is.
    """

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        *,
        chunks: Sequence[nn.Module],
        replicas: dist.ProcessGroup,
        slices: dist.ProcessGroup,
        settings: ShampooConfig,
    ) -> None:
        """`groups` are Megatron's param groups, of the parameters of `chunks`; process groups as of MegatronLayout."""
        found = model_parameters(chunks)
        layout = MegatronLayout(found, lambda: _runs(chunks), replicas, slices)
        super().__init__(named(groups, found), **settings.model_dump(), model=nn.ModuleList(chunks), layout=layout)

    def state_dict(self) -> dict[str, Any]:
        """Shampoo's, and the blocks under "shampoo"."""
        return {**super().state_dict(), KEY: sharded_blocks([self])}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            SettingsError: if it is not a state of Shampoo, or lacks a block of this rank.
        """
        own, saved = apart(state_dict)
        super().load_state_dict(own)
        load_sharded_blocks([self], saved)


def register_emerging_optimizer(**settings: Any) -> bool:
    """Makes `config.optimizer = "shampoo"` known to Megatron's `get_megatron_optimizer`.

    That gives an optimizer which every rank steps as a whole. `get_megatron_shampoo_optimizer` is for all else, and
    for releases without such a registry (before 0.18).

    Args:
        settings: Shampoo's, as `get_megatron_shampoo_optimizer` takes them.

    Returns:
        Whether this Megatron has the registry.

    Raises:
        SettingsError: for a setting that is refused, and for a Megatron that has not what Shampoo needs of it.
    """
    parse(settings)
    MEGATRON.check()

    def arguments(config: OptimizerConfig, chunks: list[nn.Module], groups: ProcessGroupCollection) -> dict[str, Any]:
        shampoo = checked(config, settings)
        refuse_unsupported(config, chunks, groups, shampoo=shampoo, layer_wise=False)
        _refuse_others(config, chunks, groups)
        return {"chunks": chunks, "replicas": groups.dp_cp, "slices": groups.tp, "settings": shampoo}

    return internals.enter_optimizer("shampoo", kind=RegisteredShampoo, allocate=prepare, arguments=arguments)


def _refuse_others(config: OptimizerConfig, chunks: Sequence[Any], groups: ProcessGroupCollection) -> None:
    refusals = (
        (
            config.use_distributed_optimizer or internals.data_parallelism(chunks[0]).use_distributed_optimizer,
            "config.use_distributed_optimizer = True",
        ),
        (config.use_layer_wise_distributed_optimizer, "config.use_layer_wise_distributed_optimizer = True"),
        (dist.get_world_size(groups.ep) > 1, "expert_model_parallel_size > 1"),
    )
    for refused, what in refusals:
        if refused:
            raise SettingsError(
                f'{what} with optimizer = "shampoo" of Megatron\'s registry: make the optimizer by '
                "ds_shampoo.megatron.get_megatron_shampoo_optimizer, which runs there"
            )


def _runs(chunks: Sequence[nn.Module]) -> dict[int, internals.Run]:
    """What every tensor that a wrapper may step stands for, by `id(tensor)`: a parameter or its fp32 copy."""
    return {
        id(held): internals.Run(parameter, 0)
        for chunk in chunks
        for parameter in chunk.parameters()
        for held in (parameter, internals.fp32_copy(parameter))
    }
