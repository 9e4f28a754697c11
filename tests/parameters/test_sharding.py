"""Models that FSDP shards are refused by name, whatever their parameters look like at the moment."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ds_shampoo import SettingsError, Shampoo
from tests.distributed.pool import WorkerPool
from tests.parameters.test_wrappers import model

Pools = Callable[[int], WorkerPool]

FSDP1 = "of a model that FSDP shards"
FSDP2 = "of a model that fully_shard (FSDP2) shards"
FLAT = "part of a FlatParameter of FSDP"


def fsdp1(inner: nn.Module, **settings: Any) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(inner, device_id=torch.device("cpu"), **settings)


def fsdp2(inner: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    return fully_shard(inner, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


def refusal(action: Callable[[], object]) -> str:
    try:
        action()
    except SettingsError as error:
        return str(error)
    return ""


def step_of(optimizer: Shampoo) -> Callable[[], object]:
    """A step on whatever gradients there are."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    return optimizer.step


def whole_for_a_moment(use_orig_params: bool) -> str:
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrapped = fsdp1(model(), use_orig_params=use_orig_params)
    with FullyShardedDataParallel.summon_full_params(wrapped):
        plain = [p for p in wrapped.parameters() if p.dim() == 2]
        assert [tuple(p.shape) for p in plain] == [(8, 6), (4, 8)]
        return refusal(lambda: Shampoo(plain, model=wrapped))


def made_of_the_former_parameters(kind: str) -> str:
    """Those that the module had before it was wrapped."""
    inner = model()
    former = list(inner.parameters())
    wrapped = fsdp2(inner) if kind == "fsdp2" else fsdp1(inner, use_orig_params=kind == "views")
    return refusal(lambda: Shampoo(former, model=wrapped))


def wrapped_later(kind: str) -> str:
    """The optimizer is there first; it would step tensors that the model has no longer."""
    inner = model()
    optimizer = Shampoo(inner.parameters(), model=inner)
    step = step_of(optimizer)
    _ = fsdp2(inner) if kind == "fsdp2" else fsdp1(inner, use_orig_params=kind == "views")
    return refusal(step)


def unsharded() -> str:
    wrapped = fsdp2(model())
    wrapped.unshard()  # type: ignore[operator]
    assert type(wrapped[0].weight) is nn.Parameter  # type: ignore[index]
    return refusal(lambda: Shampoo(wrapped.parameters(), model=wrapped))


def a_part() -> tuple[str, str]:
    """A model of which a part is sharded: that part's parameters, and the others."""
    outer = nn.Sequential(model(), nn.Linear(4, 4))
    outer[0] = fsdp1(outer[0], use_orig_params=True)
    inside = refusal(lambda: Shampoo(outer.parameters(), model=outer))
    return inside, refusal(lambda: Shampoo(outer[1].parameters(), model=outer))


def adapters_of_a_sliced_model() -> str:
    """What is trained is plain, and on every rank, though frozen weights beside it are not."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    outer = nn.Sequential(model().requires_grad_(False), nn.Linear(4, 4))
    parallelize_module(outer, init_device_mesh("cpu", (dist.get_world_size(),)), {"0.0": ColwiseParallel()})
    return refusal(lambda: Shampoo(outer[1].parameters(), model=outer))


@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_parameters_that_are_whole_for_a_moment(pools: Pools, world_size: int, use_orig_params: bool) -> None:
    for message in pools(world_size).run(whole_for_a_moment, use_orig_params):
        assert (FLAT if use_orig_params else FSDP1) in message
        assert "ds_shampoo.initialize" in message


@pytest.mark.parametrize(("kind", "said"), [("flat", FSDP1), ("views", FLAT), ("fsdp2", FSDP2)])
def test_parameters_of_before_the_wrapper(pools: Pools, kind: str, said: str) -> None:
    for message in pools(2).run(made_of_the_former_parameters, kind):
        assert said in message


@pytest.mark.parametrize(("kind", "said"), [("flat", FLAT), ("views", FLAT), ("fsdp2", FSDP2)])
def test_a_model_that_is_wrapped_after_the_optimizer_was_made(pools: Pools, kind: str, said: str) -> None:
    for message in pools(2).run(wrapped_later, kind):
        assert "Shampoo can't train parameter '0.weight'" in message
        assert said in message


def test_unsharded_parameters(pools: Pools) -> None:
    for message in pools(2).run(unsharded):
        assert FSDP2 in message


def test_a_part_of_a_model(pools: Pools) -> None:
    for inside, beside in pools(2).run(a_part):
        assert FLAT in inside
        assert not beside


def test_adapters_of_a_sliced_model(pools: Pools) -> None:
    assert pools(2).run(adapters_of_a_sliced_model) == ["", ""]
