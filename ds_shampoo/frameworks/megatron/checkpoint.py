"""Blocks in Megatron's distributed checkpoints: under names that hold at any data and tensor parallel size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedObject

from ds_shampoo.config import SettingsError
from ds_shampoo.frameworks.megatron import internals
from ds_shampoo.frameworks.megatron.inner import InnerShampoo
from ds_shampoo.frameworks.megatron.layout import MegatronLayout
from ds_shampoo.state.saving import blocks_state, load_blocks

KEY = "shampoo"
# Lists of tensors whose number and shapes a block's own shape tells; the rest of its state is one object.
_TENSORS = ("factors", "roots")

if TYPE_CHECKING:
    from megatron.core.optimizer.optimizer import ChainedOptimizer as _Base
else:
    _Base = object


class WithBlocks(_Base):  # type: ignore[misc]
    """Adds the blocks to what one of Megatron's chained optimizers saves and loads."""

    def inner(self) -> Iterator[InnerShampoo]:
        """The Shampoo in each of the chained optimizers that has parameters."""
        return (internals.inner_optimizer(wrapper) for wrapper in internals.stepping(self))

    def metrics(self) -> dict[str, float]:
        """`Shampoo.metrics` of this rank; those of experts under "expert_" and their names."""
        found: dict[str, float] = {}
        for number, shampoo in enumerate(self.inner()):
            found |= {f"{'expert_' * number}{key}": value for key, value in shampoo.metrics().items()}
        return found

    def sharded_state_dict(
        self, model_sharded_state_dict: Mapping[str, Any], is_loading: bool = False, **kwargs: Any
    ) -> dict[Any, Any]:
        """Megatron's, and under "shampoo" every block with its factors and roots, saved once, by its owner."""
        whole = super().sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs)
        inner = list(self.inner())
        _count(inner, _steps(inner))  # to prepare for loading, Megatron's distributed optimizer loads what it has
        return {**whole, KEY: sharded_blocks(inner)}

    def state_dict(self) -> Any:
        """Megatron's for a job whose parameters no other rank shares, and the blocks.

        Raises:
            SettingsError: where they do: of such a state Megatron writes one rank's, and a rank has its blocks only.
        """
        inner = list(self.inner())
        if any(dist.get_world_size(_layout(shampoo).replicas) > 1 for shampoo in inner):
            raise SettingsError("ckpt_format = 'torch': Shampoo's blocks need a distributed one, 'torch_dist'")
        blocks = {name: block for shampoo in inner for name, block in _states(shampoo).items()}
        return {"optimizers": super().state_dict(), KEY: {"step": _steps(inner), "blocks": blocks}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Any) -> None:
        """Takes back what either gave.

        Raises:
            SettingsError: if it is not a state of Shampoo, or lacks a block of this rank.
        """
        own, saved = apart(state_dict)
        super().load_state_dict(own.get("optimizers", own))
        load_sharded_blocks(list(self.inner()), saved)


def sharded_blocks(optimizers: Sequence[InnerShampoo]) -> dict[str, Any]:
    """The optimizers' steps, and their blocks of this rank as dist_checkpointing takes them."""
    blocks = {name: block for shampoo in optimizers for name, block in _sharded(shampoo).items()}
    return {"step": _steps(optimizers), "blocks": blocks}


def load_sharded_blocks(optimizers: Sequence[InnerShampoo], saved: Mapping[str, Any]) -> None:
    """Takes back what `sharded_blocks` gave and dist_checkpointing loaded, after the optimizers' own states.

    Raises:
        SettingsError: if a block of this rank is missing.
    """
    _count(optimizers, saved["step"])
    blocks = {name: _joined(state) for name, state in saved["blocks"].items()}
    for shampoo in optimizers:
        load_blocks(blocks, shampoo.subgroups())


def apart(state_dict: Any) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """A state without what stands under "shampoo", and that.

    Raises:
        SettingsError: if there is nothing.
    """
    if not isinstance(state_dict, Mapping) or KEY not in state_dict:
        raise SettingsError("this is not a state of Shampoo: it has no 'shampoo'")
    return {key: value for key, value in state_dict.items() if key != KEY}, state_dict[KEY]


def _count(optimizers: Sequence[InnerShampoo], steps: int) -> None:
    for shampoo in optimizers:
        shampoo.count_steps(steps)


def _steps(optimizers: Sequence[InnerShampoo]) -> int:
    return max((subgroup.sharded.last_step for shampoo in optimizers for subgroup in shampoo.subgroups()), default=0)


def _sharded(shampoo: InnerShampoo) -> dict[str, Any]:
    """This rank's blocks as dist_checkpointing takes them; a copy that other tensor-parallel ranks save is marked."""
    sliced, copy = shampoo.sliced_parameters(), dist.get_rank(_layout(shampoo).slices)
    found: dict[str, Any] = {}
    for name, state in _states(shampoo).items():
        key, replica = f"optimizer.shampoo.{name}", 0 if name.rpartition("[")[0] in sliced else copy
        rest = {part: value for part, value in state.items() if part not in _TENSORS}
        found[name] = {
            part: [
                ShardedTensor.from_rank_offsets(f"{key}.{part}.{number}", tensor, replica_id=replica)
                for number, tensor in enumerate(state[part])
            ]
            for part in _TENSORS
        }
        found[name]["rest"] = ShardedObject(f"{key}.rest", rest, (1,), (0,), replica_id=replica)
    return found


def _states(shampoo: InnerShampoo) -> dict[str, Any]:
    return blocks_state(subgroup.sharded for subgroup in shampoo.subgroups())


def _joined(state: Mapping[str, Any]) -> dict[str, Any]:
    """A block's state as `blocks_state` has it, from the parts in which it is saved."""
    return {**{part: value for part, value in state.items() if part != "rest"}, **state.get("rest", {})}


def _layout(shampoo: InnerShampoo) -> MegatronLayout:
    assert isinstance(shampoo.layout, MegatronLayout)
    return shampoo.layout
