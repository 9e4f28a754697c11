"""Shampoo under Megatron's own training: its optimizers' wrappers around our inner one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from ds_shampoo.config import ShampooConfig
from ds_shampoo.frameworks.megatron import internals
from ds_shampoo.frameworks.megatron.checkpoint import WithBlocks
from ds_shampoo.frameworks.megatron.inner import InnerShampoo, named, prepare
from ds_shampoo.frameworks.megatron.layout import MegatronLayout
from ds_shampoo.frameworks.megatron.names import ModelParameter, model_parameters
from ds_shampoo.frameworks.megatron.support import checked, refuse_unsupported
from ds_shampoo.optimizer import Shampoo
from ds_shampoo.roots.schedule import turns_of
from ds_shampoo.sharding.model_order import by_name, names_over_ranks


class ShampooChainedOptimizer(WithBlocks, ChainedOptimizer):  # type: ignore[misc]
    """Megatron's optimizers for the weights that all ranks share and for experts, with Shampoo in each."""


class ShampooLayerWiseOptimizer(WithBlocks, LayerWiseDistributedOptimizer):  # type: ignore[misc]
    """The same, every rank with the whole elementwise state of some parameters; blocks have owners of their own."""


def get_megatron_shampoo_optimizer(
    config: OptimizerConfig,
    model_chunks: list[nn.Module],
    config_overrides: dict[Any, Any] | None = None,
    use_gloo_process_groups: bool = True,
    layer_wise_distributed_optimizer: bool = False,
    pg_collection: ProcessGroupCollection | None = None,
    **settings: Any,
) -> ShampooChainedOptimizer | ShampooLayerWiseOptimizer:
    """Shampoo for Megatron's training loop, called as its `get_megatron_muon_optimizer` is.

    The optimizer is Megatron's own for Adam, with Shampoo in Adam's place: precision, loss scale, clipping, the
    distributed optimizer and param groups are what `config` makes of them. Blocks are owned by the ranks that share
    a parameter: the data and context parallel ones, or the expert-data-parallel ones of an expert.

    Args:
        config: learning rate, weight decay and everything else that is not Shampoo's own. `config.optimizer` and
            Adam's betas and eps are not looked at.
        model_chunks: this rank's parts of the model, in Megatron's DistributedDataParallel.
        config_overrides: as `get_megatron_optimizer`'s; None leaves biases and norms undecayed.
        use_gloo_process_groups: as there.
        layer_wise_distributed_optimizer: spread the elementwise state over the ranks by whole parameters.
        pg_collection: process groups; None for those of `parallel_state`.
        settings: Shampoo's, the keys of README's table except `lr`, `weight_decay` and `decoupled_weight_decay`.

    Raises:
        SettingsError: for a setting that is refused, and for a feature of Megatron under which Shampoo does not run.
    """
    shampoo = checked(config, settings)
    groups = pg_collection if pg_collection is not None else ProcessGroupCollection.use_mpu_process_groups()
    refuse_unsupported(config, model_chunks, groups, shampoo=shampoo, layer_wise=layer_wise_distributed_optimizer)
    members = internals.param_groups(model_chunks, config, config_overrides)
    with _as_adam(config, layer_wise_distributed_optimizer):
        chained = get_megatron_optimizer(config, model_chunks, config_overrides, use_gloo_process_groups, pg_collection)
    wrappers: list[MegatronOptimizer] = internals.wrappers_of(chained)
    whole: ShampooChainedOptimizer | ShampooLayerWiseOptimizer
    if layer_wise_distributed_optimizer:
        # In bf16 it wraps up what it gets itself, in fp32 it does not.
        parts = [internals.inner_optimizer(wrapper) for wrapper in wrappers] if config.bf16 else wrappers
        whole = ShampooLayerWiseOptimizer(parts, config, groups, [prepare] * len(parts))
    else:
        whole = ShampooChainedOptimizer(wrappers)
    found = model_parameters(model_chunks)
    for wrapper in internals.stepping(whole):
        _put_in_place(wrapper, model_chunks, members=members, found=found, groups=groups, shampoo=shampoo)
    inner = list(whole.inner())
    _share_turns(inner, names_over_ranks([parameter.name for parameter in found.values()]))
    for optimizer in inner:
        optimizer.prepare()
    return whole


def _share_turns(optimizers: Sequence[Shampoo], names: Sequence[str]) -> None:
    """Spreads the boundaries of several optimizers' blocks as if one had them all, before they step.

    Args:
        names: those of all parameters, in the model's order.
    """
    blocks = by_name({block for optimizer in optimizers for block in optimizer.turns}, names)
    turns = dict(zip(blocks, turns_of(blocks, 0), strict=True))
    for optimizer in optimizers:
        optimizer.take_turns(turns)


def _put_in_place(
    wrapper: MegatronOptimizer,
    chunks: Sequence[nn.Module],
    *,
    members: Sequence[Mapping[str, Any]],
    found: Mapping[int, ModelParameter],
    groups: ProcessGroupCollection,
    shampoo: ShampooConfig,
) -> None:
    """Gives a wrapper Shampoo as its inner optimizer; `members` are all param groups, of the model's parameters."""
    present = wrapper.param_groups
    expert = internals.holds_experts(present[0])
    members = [group for group in members if internals.holds_experts(group) == expert]
    layout = MegatronLayout(
        found,
        lambda: internals.runs_of(wrapper),
        replicas=groups.expt_dp if expert else groups.dp_cp,
        slices=groups.expt_tp if expert else groups.tp,
    )
    inner = InnerShampoo(named(members, found), **shampoo.model_dump(), model=nn.ModuleList(chunks), layout=layout)
    for group, held in zip(inner.param_groups, present, strict=True):
        group["params"] = held["params"]
    internals.put_inside(wrapper, inner, prepare)


@contextlib.contextmanager
def _as_adam(config: OptimizerConfig, layer_wise: bool) -> Iterator[None]:
    """Has Megatron build its optimizer for Adam; its layer-wise one makes fp32 copies itself, of its share only."""
    own = config.optimizer, config.bf16
    config.optimizer, config.bf16 = "adam", config.bf16 and not layer_wise
    try:
        yield
    finally:
        config.optimizer, config.bf16 = own
