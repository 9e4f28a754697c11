"""What the workers run under torch's DistributedDataParallel, without DeepSpeed."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

from ds_shampoo import SettingsError, Shampoo
from tests.distributed.jobs import Trace, batch, build_model, flat


def mean_loss(model: nn.Module, step: int, rank: int, world_size: int) -> Tensor:
    mine = batch(step).chunk(world_size)[rank]
    loss: Tensor = model(mine[:, :-1], mine[:, 1:])
    return loss


def train(
    ddp: DistributedDataParallel, optimizer: Shampoo, first: int, steps: int, accumulation: int = 1
) -> list[float]:
    """Steps `first`, ... of the job; every rank must hold the same parameters after each of them."""
    group = ddp.process_group
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    losses = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float32, device="cpu")
        for part in range(accumulation):
            quiet = ddp.no_sync() if part < accumulation - 1 else contextlib.nullcontext()
            with quiet:
                loss = mean_loss(ddp, step, rank * accumulation + part, world_size * accumulation) / accumulation
                loss.backward()
            total += loss.detach()
        optimizer.step()
        dist.all_reduce(total, group=group)
        losses.append(total.item() / world_size)
        digests: list[Any] = [None] * world_size
        dist.all_gather_object(digests, hashlib.sha256(flat(ddp).tobytes()).hexdigest(), group=group)
        assert len(set(digests)) == 1, f"the ranks' parameters differ after step {step}"
    return losses


def made(
    settings: dict[str, Any],
    groups: Callable[[nn.Module], Any] | None = None,
    precision: torch.dtype = torch.float32,
    **ddp: Any,
) -> tuple[Any, Shampoo]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = DistributedDataParallel(build_model().to(precision), **ddp)
    return wrapped, Shampoo(groups(wrapped.module) if groups else wrapped.parameters(), model=wrapped, **settings)


def job(
    steps: int,
    settings: dict[str, Any],
    groups: Callable[[nn.Module], Any] | None = None,
    accumulation: int = 1,
    **ddp: Any,
) -> Trace:
    """The job from its beginning; `extra` has the blocks of this rank and the names of what is trained."""
    wrapped, optimizer = made(settings, groups, **ddp)
    start = flat(wrapped)
    losses = train(wrapped, optimizer, 0, steps, accumulation)
    owned = [str(owned.block) for each in optimizer.subgroups() for owned in each.sharded.owned_blocks]
    return Trace(losses, start, flat(wrapped), optimizer.metrics(), {"owned": owned, "table": optimizer.describe()})


# ---------------------------------------------------------------- state


def saved(path: str, steps: int, settings: dict[str, Any], to: int | None = 0) -> Trace:
    """Trains, saves model and optimizer on the first rank, and goes on training for as long again."""
    wrapped, optimizer = made(settings)
    start = flat(wrapped)
    losses = train(wrapped, optimizer, 0, steps)
    optimizer.consolidate_state_dict(to)
    if dist.get_rank() == 0:
        torch.save({"model": wrapped.module.state_dict(), "optimizer": optimizer.state_dict()}, path)
    losses += train(wrapped, optimizer, steps, steps)
    return Trace(losses, start, flat(wrapped), optimizer.metrics())


def resumed(path: str, first: int, steps: int, settings: dict[str, Any]) -> tuple[Trace, bool]:
    """Goes on from a save; also whether all of the optimizer's state came back as it was, bit for bit."""
    wrapped, optimizer = made(settings)
    start = flat(wrapped)
    whole = torch.load(path, weights_only=True)
    wrapped.module.load_state_dict(whole["model"])
    optimizer.load_state_dict(whole["optimizer"])
    shown_as_owned(optimizer)
    optimizer.consolidate_state_dict()
    equal = same(optimizer.state_dict(), whole["optimizer"])
    losses = train(wrapped, optimizer, first, steps)
    return Trace(losses, start, flat(wrapped), optimizer.metrics()), equal


def shown_as_owned(optimizer: Shampoo) -> None:
    """Every parameter's entry shows this rank's blocks of it, and no other rank's."""
    for each in optimizer.subgroups():
        for name, param in zip(each.subgroup.names, each.stand_ins, strict=True):
            own = {str(owned.block.index) for owned in each.sharded.owned_blocks_of(name)}
            assert set(optimizer.state[param].get("blocks", {})) == own


def same(a: Any, b: Any) -> bool:
    """Whether two trees of tensors and numbers are equal to the bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return bool(a == b)


def refused_states(settings: dict[str, Any]) -> list[str]:
    """What `state_dict` says on a rank that has its own blocks only, and when it says so."""
    wrapped, optimizer = made(settings)
    said = []

    def ask() -> None:
        try:
            optimizer.state_dict()
            said.append("")
        except RuntimeError as error:
            said.append(str(error))

    ask()
    optimizer.consolidate_state_dict()
    ask()
    train(wrapped, optimizer, 0, 1)
    ask()
    optimizer.consolidate_state_dict(to=1)
    ask()
    state: list[Any] = [optimizer.state_dict() if dist.get_rank() == 1 else None]
    dist.broadcast_object_list(state, src=1)
    optimizer.load_state_dict(state[0])
    ask()
    optimizer.consolidate_state_dict()
    ask()
    optimizer.add_param_group({"params": []})
    ask()
    return said


def refused_on_one_rank(settings: dict[str, Any]) -> tuple[str, bool]:
    """Loads a state that lacks a block on the last rank alone; also whether everything is as it was."""
    wrapped, optimizer = made(settings)
    train(wrapped, optimizer, 0, 7)
    optimizer.consolidate_state_dict()
    before = optimizer.state_dict()
    broken = {**before, "state": {number: dict(entry) for number, entry in before["state"].items()}}
    if dist.get_rank() == dist.get_world_size() - 1:
        del next(entry for entry in broken["state"].values() if "blocks" in entry)["blocks"]
    message = ""
    try:
        optimizer.load_state_dict(broken)
    except SettingsError as error:
        message = str(error)
    optimizer.consolidate_state_dict()
    return message, same(optimizer.state_dict(), before)


def through_torchs_checkpoint(folder: str, settings: dict[str, Any], way: str) -> bool:
    """Whether a job goes on bit for bit that torch.distributed.checkpoint saved and loaded."""
    options = StateDictOptions(full_state_dict=way != "sharded", broadcast_from_rank0=way == "from rank 0")
    wrapped, optimizer = made(settings)
    train(wrapped, optimizer, 0, 7)
    optimizer.consolidate_state_dict()
    state = get_optimizer_state_dict(wrapped, optimizer, options=options)
    other, fresh = made(settings)
    other.module.load_state_dict(wrapped.module.state_dict())
    fresh.consolidate_state_dict()
    if way == "from rank 0" and dist.get_rank():
        state = {}
    if way == "sharded":
        dcp.save(state, checkpoint_id=folder)
        state = get_optimizer_state_dict(other, fresh, options=options)
        dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(other, fresh, state, options=options)
    shown_as_owned(fresh)
    train(wrapped, optimizer, 7, 6)
    train(other, fresh, 7, 6)
    return torch.equal(torch.from_numpy(flat(wrapped)), torch.from_numpy(flat(other)))


def loaded_on_one_rank(settings: dict[str, Any]) -> str:
    wrapped, optimizer = made(settings)
    optimizer.consolidate_state_dict()
    fresh = copy.deepcopy(optimizer.state_dict())
    train(wrapped, optimizer, 0, 3)
    optimizer.consolidate_state_dict()
    try:
        optimizer.load_state_dict(fresh if dist.get_rank() else optimizer.state_dict())
    except SettingsError as error:
        return str(error)
    return ""


# ---------------------------------------------------------------- parameters that come and go


class Branches(nn.Module):
    """A trunk, and a branch that not every pass uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.branch, self.last = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x: Tensor, branch: bool) -> Tensor:
        x = torch.tanh(self.trunk(x))
        return self.last(torch.tanh(self.branch(x)) if branch else x)


def branch_loss(model: nn.Module, step: int, used: bool, rank: int = 0, world_size: int = 1) -> Tensor:
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step)).chunk(world_size)[rank]
    loss: Tensor = (model(x, used) - x.sin()).square().mean()
    return loss


BRANCH_SETTINGS = {"lr": 0.01, "block_size": 8, "root_interval": 3, "weight_decay": 0.1, "matrix_epsilon": 1e-3}
# The trunk's statistics are never due at the same steps as the branch's, whose steps are fewer.
UNEVEN = {**BRANCH_SETTINGS, "statistics_interval": 2}


def with_an_unused_branch(steps: int, settings: dict[str, Any], ddp: dict[str, Any] | None = None) -> Any:
    """Steps of which two in three use the branch; in one process without `ddp`."""
    model: nn.Module = Branches()
    rank, world_size = (0, 1) if ddp is None else (dist.get_rank(), dist.get_world_size())
    if ddp is not None:
        model = DistributedDataParallel(model, **ddp)
    optimizer = Shampoo(model.parameters(), model=model, **settings)
    for step in range(steps):
        optimizer.zero_grad()
        if step % 3:
            branch_loss(model, step, True, rank, world_size).backward()
        else:
            branch_loss(model, step, False, rank, world_size).backward()
        optimizer.step()
    counts = [int(optimizer.state[p]["step"]) for p in model.parameters()]
    return flat(model), counts, optimizer.metrics()


def frozen_for_a_time(steps: int, settings: dict[str, Any], shared: bool, rewrapped: bool = True) -> Any:
    """The branch is frozen at first, and trained later by a wrapper that is made anew."""
    inner = Branches()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
    inner.branch.requires_grad_(False)
    model: nn.Module = DistributedDataParallel(inner) if shared else inner
    optimizer = Shampoo(model.parameters(), model=model, **settings)
    for step in range(steps):
        if step == steps // 2:
            inner.branch.requires_grad_(True)
            model = DistributedDataParallel(inner) if shared and rewrapped else model
        if step == steps - 2:  # the trunk rests at the end
            inner.trunk.requires_grad_(False)
            inner.trunk.zero_grad()
            model = DistributedDataParallel(inner) if shared else model
        optimizer.zero_grad()
        branch_loss(model, step, True, rank, world_size).backward()
        optimizer.step()
    return flat(inner), [int(optimizer.state[p]["step"]) for p in inner.parameters()]


# ---------------------------------------------------------------- wrappers in their places


class Around(nn.Module):
    """A trainer's module around the wrapper."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.net = inner

    def forward(self, *given: Any) -> Any:
        return self.net(*given)


def nested(steps: int, settings: dict[str, Any]) -> tuple[np.ndarray, list[str], list[str]]:
    """The parameters, this rank's blocks, and what is found by names of either kind."""
    inner = DistributedDataParallel(Branches())
    outer = Around(inner)
    optimizer = Shampoo(outer.named_parameters(), model=outer, roles={"net.trunk.weight": "none"}, **settings)
    for step in range(steps):
        optimizer.zero_grad()
        branch_loss(outer, step, True, dist.get_rank(), dist.get_world_size()).backward()
        optimizer.step()
    names = [p.name for group in optimizer._subgroups.logical for p in group]
    return flat(outer), [str(o.block) for each in optimizer.subgroups() for o in each.sharded.owned_blocks], names


def in_pairs(steps: int, settings: dict[str, Any]) -> list[np.ndarray]:
    """Two jobs beside each other, each on half of the ranks, and a second model and optimizer on every one of them."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    halves = [dist.new_group(list(range(first, first + world_size // 2))) for first in (0, world_size // 2)]
    group = halves[rank // (world_size // 2)]
    pairs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = DistributedDataParallel(build_model(), process_group=group)
        pairs.append((model, Shampoo(model.parameters(), model=model, **settings)))
    for step in range(steps):
        for model, optimizer in pairs:
            train(model, optimizer, step, 1)
    assert all(optimizer.metrics()["exchange_bytes"] > 0 for _, optimizer in pairs)
    return [flat(model) for model, _ in pairs]


# ---------------------------------------------------------------- what is refused


def refused(kind: str) -> str:
    last = dist.get_rank() == dist.get_world_size() - 1
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(6, 6))
    settings: dict[str, Any] = {"lr": 0.02 if last and kind == "settings" else 0.01}
    if kind == "values" and last:
        model.module.weight.data[0, 0] += 1
    if kind == "job-wide" and last:
        settings["exchange_dtype"] = "bfloat16"
    if kind == "threads" and last:
        settings["root_timeout"] = 60.0
    params: Any = [{"params": model.parameters()}]
    if kind == "groups" and last:
        params = [{"params": [model.module.weight]}, {"params": [model.module.bias]}]
    if kind == "parameters" and last:
        params = [model.module.weight]
    if kind == "outside" and last:
        params[0]["params"] = [*model.parameters(), nn.Parameter(torch.ones(2, 2))]
    try:
        optimizer = Shampoo(params, model=model, **settings)
        if kind == "later":
            optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
            optimizer.prepare()
        if kind == "join":
            with model.join():
                model(torch.ones(2, 6)).sum().backward()
                optimizer.step()
    except (SettingsError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def unfrozen_without_a_new_wrapper(settings: dict[str, Any]) -> str:
    try:
        frozen_for_a_time(8, settings, shared=True, rewrapped=False)
    except RuntimeError as error:
        return str(error)
    return ""


def unfrozen_unseen(settings: dict[str, Any], before: bool) -> str:
    """A branch that the wrapper found frozen is trained from before the optimizer, or its blocks, were made."""
    inner = Branches()
    inner.branch.requires_grad_(False)
    model = DistributedDataParallel(inner)
    inner.branch.requires_grad_(before)
    optimizer = Shampoo(model.parameters(), model=model, **settings)
    inner.branch.requires_grad_(True)
    optimizer.prepare()
    branch_loss(model, 0, True, dist.get_rank(), dist.get_world_size()).backward()
    start = flat(inner)
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error) if np.array_equal(start, flat(inner)) else "it was stepped"
    return ""


def closures(steps: int, settings: dict[str, Any]) -> tuple[np.ndarray, list[float]]:
    wrapped, optimizer = made(settings)
    losses = []
    for step in range(steps):

        def closure(step: int = step) -> float:
            optimizer.zero_grad()
            loss = mean_loss(wrapped, step, dist.get_rank(), dist.get_world_size())
            loss.backward()
            return loss.item()

        losses.append(optimizer.step(closure))
    return flat(wrapped), losses
