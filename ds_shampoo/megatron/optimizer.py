"""Shampoo under Megatron's own training: its optimizers' wrappers around our inner one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import _get_param_groups, get_megatron_optimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from ds_shampoo.algorithm import grafting
from ds_shampoo.config import SettingsError, ShampooConfig, parse
from ds_shampoo.megatron.checkpoint import WithBlocks
from ds_shampoo.megatron.layout import MegatronLayout, runs_of
from ds_shampoo.megatron.names import Place, places
from ds_shampoo.optimizer import Shampoo, share_places
from ds_shampoo.sharding.order import names_over_ranks

# What Megatron's own configuration says.
_MEGATRONS = {
    "lr": "config.lr",
    "weight_decay": "config.weight_decay",
    "decoupled_weight_decay": "config.decoupled_weight_decay",
}


class InnerShampoo(Shampoo):
    """Shampoo as Megatron's wrappers take an inner optimizer: each state counts its steps as torch's Adam does.

    That is in a tensor on the host, so that no step waits for the device.
    """

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Shampoo's, but for the counts: Megatron goes on to copy a checkpoint's tensors over all that is there."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state.pop("step", None)

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        state = super()._state_of(param)
        if "step" in state:
            state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device="cpu")
        return state


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
    shampoo = _checked(config, settings)
    groups = pg_collection if pg_collection is not None else ProcessGroupCollection.use_mpu_process_groups()
    _refuse_unsupported(config, model_chunks, groups, shampoo, layer_wise_distributed_optimizer)
    members = _get_param_groups(model_chunks, config, config_overrides)
    with _as_adam(config, layer_wise_distributed_optimizer):
        chained = get_megatron_optimizer(config, model_chunks, config_overrides, use_gloo_process_groups, pg_collection)
    wrappers: list[MegatronOptimizer] = list(chained.chained_optimizers)
    whole = (
        ShampooLayerWiseOptimizer(wrappers, config, groups, [_prepare] * len(wrappers))
        if layer_wise_distributed_optimizer
        else ShampooChainedOptimizer(wrappers)
    )
    found = places(model_chunks)
    for wrapper in whole.chained_optimizers:
        if not wrapper.is_stub_optimizer:
            _put_in_place(wrapper, model_chunks, members, found, groups, shampoo)
    inner = list(whole.inner())
    share_places(inner, names_over_ranks([place.name for place in found.values()]))
    for optimizer in inner:
        optimizer.prepare()
    return whole


def _put_in_place(
    wrapper: MegatronOptimizer,
    chunks: Sequence[nn.Module],
    members: Sequence[Mapping[str, Any]],
    found: Mapping[int, Place],
    groups: ProcessGroupCollection,
    shampoo: ShampooConfig,
) -> None:
    """Gives a wrapper Shampoo as its inner optimizer; `members` are all param groups, of the model's parameters."""
    present = wrapper.param_groups
    expert = bool(present[0]["is_expert_parallel"])
    members = [group for group in members if group["is_expert_parallel"] == expert]
    layout = MegatronLayout(
        found,
        runs_of(wrapper),
        replicas=groups.expt_dp if expert else groups.dp_cp,
        slices=groups.expt_tp if expert else groups.tp,
    )
    named = [{**group, "params": [(found[id(p)].name, p) for p in group["params"]]} for group in members]
    inner = InnerShampoo(named, **shampoo.model_dump(), model=nn.ModuleList(chunks), layout=layout)
    for group, held in zip(inner.param_groups, present, strict=True):
        group["params"] = held["params"]
    wrapper.optimizer, wrapper.init_state_fn = inner, _prepare


def _prepare(inner: Shampoo, config: OptimizerConfig | None = None) -> None:
    """What Megatron calls to have state allocated before it is loaded."""
    inner.prepare()


@contextlib.contextmanager
def _as_adam(config: OptimizerConfig, layer_wise: bool) -> Iterator[None]:
    """Has Megatron build its optimizer for Adam; its layer-wise one makes fp32 copies itself, of its share only."""
    own = config.optimizer, config.bf16
    config.optimizer, config.bf16 = "adam", config.bf16 and not layer_wise
    try:
        yield
    finally:
        config.optimizer, config.bf16 = own


def _checked(config: OptimizerConfig, settings: Mapping[str, Any]) -> ShampooConfig:
    for key, place in _MEGATRONS.items():
        if key in settings:
            raise SettingsError(f"Shampoo setting '{key}' = {settings[key]!r}: under Megatron set {place}")
    megatrons = {key: getattr(config, key) for key in _MEGATRONS}
    if megatrons["lr"] is None:
        raise SettingsError("config.lr = None: Shampoo needs a learning rate, Adam's")
    return parse({**settings, **{key: value for key, value in megatrons.items() if value is not None}})


def _refuse_unsupported(
    config: OptimizerConfig,
    chunks: Sequence[Any],
    groups: ProcessGroupCollection,
    shampoo: ShampooConfig,
    layer_wise: bool,
) -> None:
    """Refuses by name what Shampoo does not run under, before anything is built.

    Raises:
        SettingsError: naming the first such feature.
    """
    ddp = chunks[0].ddp_config
    refusals = (
        (getattr(config, "optimizer_cpu_offload", False), "config.optimizer_cpu_offload = True"),
        (getattr(config, "use_precision_aware_optimizer", False), "config.use_precision_aware_optimizer = True"),
        (
            getattr(config, "overlap_param_gather_with_optimizer_step", False),
            "config.overlap_param_gather_with_optimizer_step = True",
        ),
        (getattr(ddp, "use_megatron_fsdp", False), "ddp_config.use_megatron_fsdp = True"),
        (
            getattr(ddp, "num_distributed_optimizer_instances", 1) > 1,
            "ddp_config.num_distributed_optimizer_instances > 1",
        ),
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
            and any(getattr(chunk, "share_embeddings_and_output_weights", False) for chunk in _modules(chunks)),
            f"embedding = '{shampoo.embedding}' for an embedding of which two pipeline stages hold a copy",
        ),
    )
    for refused, what in refusals:
        if refused:
            raise SettingsError(f"{what}: Shampoo does not run there; see docs/layouts.md")


def _modules(chunks: Sequence[nn.Module]) -> Iterator[nn.Module]:
    for chunk in chunks:
        yield from chunk.modules()
