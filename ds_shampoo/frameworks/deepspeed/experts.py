"""Expert-parallel parameters: their names over all ranks, and what DeepSpeed does not do for foreign ones.

DeepSpeed knows the experts of `deepspeed.moe` by their layers. For others, as Megatron's, the engine is told here,
param groups are split, and checkpoints get the weights that DeepSpeed does not save.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ds_shampoo.config import SettingsError
from ds_shampoo.frameworks.deepspeed.internals import expert_group, expert_rank, mark_as_having_experts, replicas
from ds_shampoo.parameters.marks import is_expert
from ds_shampoo.sharding.expert_names import expert_name
from ds_shampoo.state.files import BlockReader, CheckpointError

_WEIGHT = "weight"


def global_name(model: nn.Module, name: str, parameter: Tensor) -> str:
    """A parameter's name among those of all ranks: each numbers its experts from 0, and here they are numbered on.

    Raises:
        ValueError: for an expert's parameter whose name does not tell which expert's.
    """
    group = expert_group(parameter)
    if group is None:
        return name
    found = expert_name(name)
    if found is None:
        raise ValueError(
            f"parameter '{name}' is an expert's, but its name does not tell which expert's: with Megatron leave "
            "moe_grouped_gemm out"
        )
    return str(found.numbered_from(expert_rank(group) * found.beside(model)))


def foreign_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """The expert-parallel parameters, by this rank's names, that are not of DeepSpeed's own layers."""
    marked = {name: p for name, p in model.named_parameters() if is_expert(p)}
    if not marked:
        return marked
    from deepspeed.moe.layer import MoE

    own = {id(p) for module in model.modules() if isinstance(module, MoE) for p in module.parameters()}
    return {name: parameter for name, parameter in marked.items() if id(parameter) not in own}


def adopt(engine: Any, params: Iterable[Any]) -> Iterable[Any]:
    """What an engine's optimizer is to be made of; to be called before DeepSpeed wraps it.

    Args:
        params: parameters or param-group dicts.

    Returns:
        `params`, or where there are foreign experts, param groups with each expert group's parameters apart.
    """
    if not tell_of_experts(engine):
        return params
    members = list(params)
    groups = members if all(isinstance(member, dict) for member in members) else [{"params": members}]
    shared = [{**group, "params": _in_group(group, None)} for group in groups]
    names = sorted({name for group in groups for p in group["params"] if (name := expert_group(p)) is not None})
    experts = [
        {**group, "params": _in_group(group, name), "moe": True, "name": name} for name in names for group in groups
    ]
    return [group for group in [*shared, *experts] if group["params"]]


def tell_of_experts(engine: Any) -> bool:
    """Has DeepSpeed treat foreign experts as experts; returns whether there are any."""
    found = bool(foreign_experts(engine.module))
    if found:
        mark_as_having_experts(engine)
    return found


def check_groups(groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuses param groups that DeepSpeed would reduce over wrong ranks.

    Raises:
        SettingsError: where experts do not stand in groups of their own, marked as DeepSpeed marks them.
    """
    for number, group in enumerate(groups):
        names = {expert_group(parameter) for parameter in group["params"]}
        if names <= {None} or (len(names) == 1 and group.get("moe") and group.get("name") in names):
            continue
        raise SettingsError(
            f"param group {number} has experts of {', '.join(sorted(name for name in names if name is not None))}, "
            "which need groups of their own: give a Shampoo object the groups that deepspeed.moe.utils."
            'split_params_into_different_moe_groups_for_optimizer({"params": [...], "name": "shared"}) makes, or name '
            "Shampoo in the config"
        )


class ExpertWeights:
    """The weights of an engine's foreign experts in a checkpoint; false where it has none.

    DeepSpeed's file of weights holds the experts of the first rank alone, and gives them to all.
    """

    def __init__(self, engine: Any, slice_rank: int) -> None:
        """`slice_rank` is this rank's number among the tensor-parallel ones."""
        self._parameters = foreign_experts(engine.module)
        self._keys = {
            name: f"{global_name(engine.module, name, parameter)} (slice {slice_rank})"
            for name, parameter in self._parameters.items()
        }
        self._engine = engine

    def __bool__(self) -> bool:
        return bool(self._parameters)

    def to_save(self) -> dict[str, dict[str, Any]]:
        """Those that this rank is the first of its group to hold, in `write_file`'s form."""
        return {
            self._keys[name]: {_WEIGHT: parameter}
            for name, parameter in self._parameters.items()
            if dist.get_rank(replicas(self._engine, expert_group(parameter))) == 0
        }

    def check(self, reader: BlockReader) -> None:
        """Holds a checkpoint's folder against what this rank needs of it, and reads that.

        Raises:
            CheckpointError: for weights that are missing or damaged.
        """
        missing = sorted(set(self._keys.values()) - set(reader.blocks))
        if missing:
            raise CheckpointError(
                f"{reader.folder} lacks the weights of {len(missing)} of the experts', {missing[0]} first"
            )
        keys = set(self._keys.values())
        reader.fetch(keys)
        for key in sorted(keys):
            if not isinstance(reader.read(key).get(_WEIGHT), Tensor):
                raise CheckpointError(f"{reader.folder}, {key}: it is no expert's weight")

    def loader(self, reader: BlockReader, strict: bool, own: Callable[..., Any] | None) -> Callable[..., None]:
        """A `custom_load_fn` for DeepSpeed's `load_checkpoint`.

        Args:
            reader: of a checked folder.
            strict: DeepSpeed's `load_module_strict`.
            own: the user's `custom_load_fn`, which is called with the right weights.
        """

        def load(src: Mapping[str, Any], dst: nn.Module) -> None:
            weights = {**src, **{name: reader.read(key)[_WEIGHT] for name, key in self._keys.items()}}
            if own is not None:
                own(src=weights, dst=dst)
            else:
                dst.load_state_dict(weights, strict=strict)

        return load


def _in_group(group: Mapping[str, Any], name: str | None) -> list[Tensor]:
    return [parameter for parameter in group["params"] if expert_group(parameter) == name]
