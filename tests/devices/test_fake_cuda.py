"""The step on a CUDA device: no wait for it, nothing of two devices at once, over layouts and settings."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from ds_shampoo import Shampoo
from ds_shampoo.config import Grafting
from tests.devices import fake_cuda as stand_ins
from tests.devices.fake_cuda import CUDA, OffloadLayout, ShardedLayout, Watch, fake_ranks
from tests.quiet import quiet_steps

SHAPES = [(24, 16), (17,), (8, 16), (8, 4, 3, 3)]
LAYOUTS = ("whole", "offload", "flat", "pieces")
PRECISIONS, DTYPES = ("highest", "high", "medium"), ("float32", "bfloat16")
CASES = list(itertools.product(LAYOUTS, ("shampoo", "spectral", "polar"), get_args(Grafting), ("before", "after")))


def rest(number: int) -> dict[str, Any]:
    """Settings that go round beside the cases, each combination of them beside each layout."""
    combinations = list(itertools.product(PRECISIONS, DTYPES, DTYPES, (True, False), (1, 3)))
    precision, root, exchange, overlap, interval = combinations[(number * 7) % len(combinations)]
    return {
        "matmul_precision": precision,
        "root_dtype": root,
        "exchange_dtype": exchange,
        "root_overlap": overlap,
        "statistics_interval": interval,
        "weight_decay": 0.1 * (number % 2),
        "decoupled_weight_decay": number % 4 > 1,
        "direction_rms": 0.2 if number % 5 == 0 else None,
        "start_preconditioning_step": 1 + 2 * (number % 3 == 0),
        "nesterov": number % 3 > 0,
        **(
            {"vector_lr_scale": 0.5, "vector_betas": (0.9, 0.99), "vector_weight_decay": 0.2} if number % 3 == 1 else {}
        ),
    }


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    missing = stand_ins.guard()
    if missing:
        pytest.skip(missing)
    with stand_ins.fake_cuda(monkeypatch) as watching:
        yield watching


@pytest.fixture
def ranks() -> Iterator[Any]:
    with fake_ranks() as group:
        yield group


def job(layout: str, group: Any, **settings: Any) -> tuple[Shampoo, list[Tensor]]:
    """An optimizer of fake parameters, and the tensors that stand in its group."""
    where = torch.device("cpu") if layout == "offload" else CUDA
    params = [torch.empty(shape, dtype=torch.float32, device=where, requires_grad=True) for shape in SHAPES]
    chosen = {"lr": 0.01, "block_size": 16, "root_interval": 2, "root_delay": 1, **settings}
    if layout == "whole":
        return Shampoo(params, **chosen), params
    if layout == "offload":
        return Shampoo(params, layout=OffloadLayout(), **chosen), params
    sharded = ShardedLayout(group, pieces=layout == "pieces")
    optimizer = Shampoo(params, layout=sharded, **chosen)
    shard = torch.empty(sharded.share(SHAPES), dtype=torch.float32, device=CUDA, requires_grad=True)
    optimizer.param_groups[0]["params"] = [shard]
    return optimizer, [shard]


def step(optimizer: Shampoo, held: list[Tensor]) -> None:
    for tensor in held:
        tensor.grad = torch.empty_like(tensor)
    optimizer.step()


def check(layout: str, watch: Watch, group: Any, **settings: Any) -> None:
    optimizer, held = job(layout, group, **settings)
    step(optimizer, held)  # which builds
    for _ in range(5):
        watch.restart()
        step(optimizer, held)
        assert watch.syncs == []
        # An offloaded parameter's update comes back, and with normalised grafting what that is made of.
        assert watch.crossings <= (3 * len(held) if layout == "offload" else 0)
        assert watch.launches
    assert optimizer.metrics()["root_updates"] > 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("preconditioner", ["shampoo", "spectral", "polar"])
def test_no_step_waits_for_the_device(watch: Watch, ranks: Any, layout: str, preconditioner: str) -> None:
    for number, (where, how, grafting, momentum) in enumerate(CASES):
        if (where, how) == (layout, preconditioner):
            settings = {"preconditioner": how, "grafting": grafting, "momentum": momentum, **rest(number)}
            check(layout, watch, ranks, **settings)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_like_another_launches_the_same(watch: Watch, ranks: Any, layout: str) -> None:
    """With all roots of a round put in force; the counts by operation are there for whoever puts bounds on them."""
    optimizer, held = job(layout, ranks, root_interval=100, statistics_beta=0.9)
    step(optimizer, held)
    for _ in range(2, quiet_steps(optimizer, root_interval=100, root_delay=1, count=3)):
        step(optimizer, held)
    counts = []
    for _ in range(3):
        watch.restart()
        step(optimizer, held)
        counts.append(watch.launches)
    assert counts[0] == counts[1] == counts[2]
    assert counts[0]["bmm"] > 0


@pytest.mark.parametrize("layout", ["whole", "flat", "pieces"])
def test_launches_do_not_grow_with_the_number_of_pieces(
    watch: Watch, ranks: Any, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor with that of parameters and blocks, only with that of blocks' shapes."""
    counts = []
    for times in (4, 8):
        monkeypatch.setattr(sys.modules[__name__], "SHAPES", SHAPES[:4] * times)
        optimizer, held = job(layout, ranks, root_interval=100)
        step(optimizer, held)
        for _ in range(2, quiet_steps(optimizer, root_interval=100, root_delay=1, count=1)):
            step(optimizer, held)
        watch.restart()
        step(optimizer, held)
        counts.append(watch.launches.copy())
    # Parameters that are stepped as they are become one tensor here, by a copy each.
    for count in counts:
        count["clone"] = count["_unsafe_view"] = 0
    assert counts[0] == counts[1]
    assert counts[0]["move"] <= 9  # what stays, what is packed and what has come, for two gathers and a scatter


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rate_of_a_role_costs_a_launch_each_for_decay_and_step(watch: Watch, ranks: Any, layout: str) -> None:
    """Where shards lie on the device; the moments are worked on whole, and everything else is as it was."""
    counts = []
    for own in ({}, {"vector_lr_scale": 0.5}):
        optimizer, held = job(layout, ranks, root_interval=100, weight_decay=0.1, root_overlap=False, **own)
        step(optimizer, held)
        watch.restart()
        step(optimizer, held)
        counts.append(watch.launches.copy())
    assert counts[1] - counts[0] == ({} if layout == "offload" else {"_foreach_add_": 2})
    assert not counts[0] - counts[1]


@pytest.mark.parametrize(
    "fault",
    [
        lambda tensor: float(tensor.sum()),
        lambda tensor: bool((tensor > 0).all()),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.nonzero(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: torch.equal(tensor, tensor),
        lambda tensor: tensor.cpu(),
        lambda tensor: torch.empty(4, device="cpu").copy_(tensor),
        lambda tensor: tensor.copy_(torch.ones(4, device="cpu")),
        lambda tensor: torch.tensor([1], device="cpu").to(CUDA),
        lambda tensor: torch.tensor([1], device=CUDA),
        lambda tensor: tensor + torch.ones(4, device="cpu"),
        lambda tensor: tensor[torch.tensor([1], device="cpu")],
    ],
)
def test_the_watch_sees(watch: Watch, fault: Any) -> None:
    tensor = torch.empty(4, device=CUDA)
    seen = False
    try:
        with contextlib.suppress(torch._subclasses.fake_tensor.DataDependentOutputException, RuntimeError):
            fault(tensor)
        seen = bool(watch.syncs) or watch.crossings > 0
    except AssertionError:
        seen = True
    assert seen
