"""What wrappers make of parameters: refused by name where it can't be trained, said where less is done than asked."""

from __future__ import annotations

import logging
import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.config import SettingsError
from ds_shampoo.sharding.table import BlockTable

logger = logging.getLogger("ds_shampoo")

# Longer than any bias, the vocabulary's of an output head aside; a flattened layer is far longer.
_LONG = 2**19

_SHARE = "under DeepSpeed Shampoo runs on every ZeRO stage, and ranks share its work: ds_shampoo.initialize"
# What a wrapper shards modules with, by where its type is found; nothing is imported for the question.
_SHARDING_MODULES = (
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "FSDP"),
    ("torch.distributed.fsdp", "FSDPModule", "fully_shard (FSDP2)"),
    ("torch.distributed._composable.fsdp", "FSDPModule", "fully_shard (FSDP2)"),
)


class Unfit(NamedTuple):
    """Why a tensor can't be trained: what it is, and what to do about it."""

    what: str
    advice: str


def unfit(tensor: Tensor) -> Unfit | None:
    """Why Shampoo can't train a tensor as it is; None for an ordinary one."""
    if is_lazy(tensor):
        return Unfit("not initialised", "run a forward pass through the lazy module first")
    return _wrapped(tensor) or _odd(tensor)


class Sharding(NamedTuple):
    """That a wrapper has sharded parts of a model.

    Attributes:
        found: what its parameters are, whatever a tensor of them looks like at the moment.
        spared: the ids of the model's parameters that are not of those parts.
    """

    found: Unfit
    spared: frozenset[int]


def sharding(model: nn.Module | None) -> Sharding | None:
    """What a wrapper has sharded of a model, by modules or by tensors; None where nothing is."""
    if model is None:
        return None
    found = [(module, what) for module in model.modules() if (what := _sharded_by(module))]
    inside = {id(parameter) for module, _ in found for parameter in module.parameters()}
    wrapped = {id(p): unfit for p in model.parameters() if (unfit := _sharded(p)) is not None}
    spared = frozenset(id(p) for p in model.parameters()) - inside - set(wrapped)
    if found:
        return Sharding(Unfit(f"of a model that {found[0][1]} shards", _SHARE), spared)
    return Sharding(next(iter(wrapped.values())), spared) if wrapped else None


def check_parameter(name: str, tensor: Tensor, sharding: Sharding | None = None) -> str:
    """Refuses a tensor that is to be trained and can't be.

    Args:
        sharding: what is known of the model.

    Returns:
        What keeps a tensor from being trained that nobody trains, as a quantised weight; empty for an ordinary one.

    Raises:
        SettingsError: naming the parameter, what it is, and what to do.
    """
    found = unfit(tensor)
    if found is None and sharding is not None and id(tensor) not in sharding.spared and tensor.requires_grad:
        found = sharding.found
    if found is None:
        return ""
    if tensor.requires_grad:
        raise SettingsError(f"Shampoo can't train parameter '{name}', which is {found.what}: {found.advice}")
    return found.what


def warn_of_repeated_work(model: nn.Module | None) -> None:
    """Logs a warning, on the first rank, where several ranks have a Shampoo each that knows nothing of the others'."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1 or dist.get_rank():
        return
    wrapped = model is not None and any(isinstance(module, DistributedDataParallel) for module in model.modules())
    where = "under DistributedDataParallel" if wrapped else "as a plain optimizer"
    logger.warning(
        "Shampoo was built %s on %d ranks, which share no work then: each keeps all factors of the parameters that it "
        "was given and computes all their roots. With model=ddp, a DistributedDataParallel module that has all that is "
        "trained, its ranks share the work; %s",
        where,
        dist.get_world_size(),
        _SHARE,
    )


def say_what_is_left_out(tables: Sequence[BlockTable], everyones: Iterable[Block], said: set[str]) -> None:
    """Logs what `left_out` has to say, unless it was `said` before."""
    level, message = left_out(tables, everyones)
    if message and message not in said:
        said.add(message)
        logger.log(level, "%s", message)


def left_out(tables: Sequence[BlockTable], everyones: Iterable[Block]) -> tuple[int, str]:
    """What there is to say where Shampoo preconditions less than its user will expect.

    Args:
        tables: those of all param groups.
        everyones: the blocks of all ranks; pipeline stages without a matrix of their own are no matter.

    Returns:
        logging's level and the message; an empty one where all is as expected.
    """
    reasons = {name: reason for table in tables for name, (_, reason) in table.blocked.items()}
    shapes = {name: shape for table in tables for name, shape in table.shapes.items()}
    flattened = _mostly_flat(reasons, shapes)
    if any(table.blocks for table in tables) or any(block.parameter not in reasons for block in everyones):
        return logging.WARNING, flattened
    if not reasons:
        return logging.INFO, ""
    counts = ", ".join(f"{count}: {reason}" for reason, count in Counter(reasons.values()).most_common())
    wished = all(reason == "preconditioned: false" for reason in reasons.values())
    message = (
        f"Shampoo preconditions no parameter here, and every step is the grafting method's alone. Of {len(reasons)} "
        f"parameters {counts}. "
    )
    return (logging.INFO if wished else logging.WARNING), (message + flattened).strip()


def _mostly_flat(reasons: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """A message where most of what is trained, or all of it, has one dimension."""
    trained = {name: math.prod(shapes[name]) for name, why in reasons.items() if not why.startswith("not trained")}
    flat = {name: count for name, count in trained.items() if sum(dim > 1 for dim in shapes[name]) < 2}
    if not flat or (
        flat != trained and (2 * sum(flat.values()) <= sum(trained.values()) or max(flat.values()) < _LONG)
    ):
        return ""
    longest = max(flat, key=lambda name: flat[name])
    return (
        f"{sum(flat.values()):,} of {sum(trained.values()):,} trained elements lie in parameters of one dimension "
        f"('{longest}' has {flat[longest]:,}): a wrapper may have flattened or sharded them, and Shampoo needs each "
        f"with its own shape; {_SHARE}"
    )


def _wrapped(tensor: Tensor) -> Unfit | None:
    """What a wrapper made a tensor of; nothing is imported for the question."""
    sharded = _sharded(tensor)
    if sharded is None and is_traceable_wrapper_subclass(tensor):
        return Unfit(f"a {type(tensor).__name__}, a tensor that wraps others", "train plain tensors, or leave it out")
    return sharded


def _sharded_by(module: nn.Module) -> str:
    return next((what for where, name, what in _SHARDING_MODULES if _is(module, where, name)), "")


def _sharded(tensor: Tensor) -> Unfit | None:
    """What a wrapper made a tensor of that leaves a part of it on every rank."""
    if _is(tensor, "torch.distributed.fsdp", "FlatParameter") or getattr(tensor, "_fsdp_flattened", False):
        return Unfit(
            "part of a FlatParameter of FSDP",
            f"matrices are flattened there, and nothing would be preconditioned; {_SHARE}",
        )
    if _is(tensor, "torch.distributed.tensor", "DTensor"):
        return Unfit("a DTensor (FSDP2 or torch's tensor parallelism)", f"this rank has a part of it only; {_SHARE}")
    return None


def _odd(tensor: Tensor) -> Unfit | None:
    """What a tensor's own type keeps from being trained."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return Unfit(f"of layout {tensor.layout}", "train dense tensors")
    if tensor.is_quantized or not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
        return Unfit(str(tensor.dtype), "train torch.float32, bfloat16 or float16, or set requires_grad to False")
    return None


def _is(value: Any, module: str, name: str) -> bool:
    found = getattr(sys.modules.get(module), name, None)
    return found is not None and isinstance(value, found)
