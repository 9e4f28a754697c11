"""The optimizer's state in the hands of others: hooks, torch's checkpoints, wrappers, resets, and what is refused."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.utils._pytree import tree_map

from ds_shampoo import SettingsError, Shampoo

SETTINGS: dict[str, Any] = {"lr": 0.01, "block_size": 4, "root_interval": 3}


def a_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 3))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x[:, :3].sin()).square().mean().backward()
        optimizer.step()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def in_force(optimizer: Shampoo) -> int:
    return int(optimizer.metrics()["preconditioned_blocks"])


# ---------------------------------------------------------------- hooks


def swapped(state_dict: dict[str, Any], a: int, b: int) -> dict[str, Any]:
    state = dict(state_dict["state"])
    state[a], state[b] = state[b], state[a]
    return {**state_dict, "state": state}


def test_a_pre_hook_that_maps_state_takes_the_blocks_along() -> None:
    """A model whose first two layers have changed places goes on as the one that was saved."""
    # With roots at every step their schedule does not depend on the order of the parameters.
    settings = {**SETTINGS, "root_interval": 1, "root_overlap": False}
    model = a_model()
    optimizer = Shampoo(model.parameters(), **settings)
    train(model, optimizer, range(7))
    other = a_model(1)
    other.load_state_dict(model.state_dict())
    first, _, second, *rest = other  # of equal shapes, 6 x 6
    order = [*second.parameters(), *first.parameters(), *(p for m in rest for p in m.parameters())]
    reordered = Shampoo(order, **settings)
    reordered.register_load_state_dict_pre_hook(lambda _, state: swapped(swapped(state, 0, 2), 1, 3))
    reordered.load_state_dict(optimizer.state_dict())
    assert in_force(reordered) > 0
    train(model, optimizer, range(7, 14))
    train(other, reordered, range(7, 14))
    assert torch.allclose(weights(model), weights(other), rtol=1e-4, atol=1e-6)


def test_hooks_see_the_whole_state_and_have_the_last_word() -> None:
    model = a_model()
    optimizer = Shampoo(model.parameters(), **SETTINGS)
    train(model, optimizer, range(4))
    seen: list[bool] = []

    def look(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        seen.append(bool(state["state"][0]["blocks"]["0"]["updates"] == 4))
        return {**state, "mine": 1}

    optimizer.register_state_dict_post_hook(look)
    state = optimizer.state_dict()
    assert state["mine"] == 1
    assert seen == [True]

    def halve(loading: Any) -> None:
        weight = next(model.parameters())
        seen.append(loading.state[weight]["step"] == 4 and "blocks" in loading.state[weight])
        loading.state[weight]["exp_avg"].mul_(0.5)

    before = state["state"][0]["exp_avg"].clone()
    optimizer.register_load_state_dict_post_hook(halve)
    optimizer.load_state_dict(state)
    assert seen == [True, True]
    assert torch.equal(optimizer.state[next(model.parameters())]["exp_avg"], before * 0.5)


# ---------------------------------------------------------------- torch's own tools


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A process group of one, which torch's distributed tools want."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flattened"])
@pytest.mark.parametrize(
    "extra", [{}, {"root_refresh_threshold": 0.3}, {"preconditioner": "spectral"}, {"preconditioner": "polar"}], ids=str
)
@pytest.mark.parametrize("steps", [0, 7])
def test_torchs_checkpoints_go_round_bit_for_bit(tmp_path: Path, flat: bool, extra: dict[str, Any], steps: int) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model = a_model()
    optimizer = Shampoo(model.parameters(), **SETTINGS, **extra)
    train(model, optimizer, range(steps))
    dcp.save(get_optimizer_state_dict(model, optimizer, options=options), checkpoint_id=str(tmp_path))
    other = a_model(1)
    other.load_state_dict(model.state_dict())
    resumed = Shampoo(other.parameters(), **SETTINGS, **extra)
    state = get_optimizer_state_dict(other, resumed, options=options)
    assert all(entry["step"] == 0 for entry in resumed.state.values())
    dcp.load(state, checkpoint_id=str(tmp_path))
    set_optimizer_state_dict(other, resumed, state, options=options)
    assert in_force(resumed) == in_force(optimizer)
    train(model, optimizer, range(steps, steps + 9))
    train(other, resumed, range(steps, steps + 9))
    assert torch.equal(weights(model), weights(other))


@pytest.mark.usefixtures("alone")
def test_a_full_state_goes_round() -> None:
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, other = a_model(), a_model()
    optimizer, resumed = (Shampoo(m.parameters(), **SETTINGS) for m in (model, other))
    train(model, optimizer, range(8))
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(
        other, resumed, get_optimizer_state_dict(model, optimizer, options=options), options=options
    )
    train(model, optimizer, range(8, 14))
    train(other, resumed, range(8, 14))
    assert torch.equal(weights(model), weights(other))


@pytest.mark.usefixtures("alone")
def test_zero_redundancy_optimizers_consolidated_state() -> None:
    model, other = a_model(), a_model()
    optimizers = [ZeroRedundancyOptimizer(m.parameters(), optimizer_class=Shampoo, **SETTINGS) for m in (model, other)]
    train(model, optimizers[0], range(8))
    optimizers[0].consolidate_state_dict()
    other.load_state_dict(model.state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    train(model, optimizers[0], range(8, 14))
    train(other, optimizers[1], range(8, 14))
    assert torch.equal(weights(model), weights(other))


# ---------------------------------------------------------------- state that somebody resets


def cleared(optimizer: Shampoo) -> None:
    optimizer.state.clear()


def deleted(optimizer: Shampoo) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            del optimizer.state[param]


def zeroed(optimizer: Shampoo) -> None:
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
        state["exp_avg_sq"].zero_()
        state["step"] = 0


def replaced(optimizer: Shampoo) -> None:
    """As ReLoRA does it: zeros of the parameter's dtype in place of what was there."""
    for param, state in optimizer.state.items():
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = torch.zeros_like(param)
        state["step"] = 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reset", [cleared, deleted, zeroed, replaced])
def test_who_resets_the_state_begins_anew(
    reset: Callable[[Shampoo], None], dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    model = a_model().to(dtype)
    optimizer = Shampoo(model.parameters(), **SETTINGS)
    run = [torch.randn(16, 6, generator=torch.Generator().manual_seed(s)).to(dtype) for s in range(30)]

    def steps(model: nn.Module, optimizer: Shampoo, first: int, last: int) -> None:
        for x in run[first:last]:
            optimizer.zero_grad()
            (model(x) - x[:, :3].sin()).square().mean().backward()
            optimizer.step()

    steps(model, optimizer, 0, 11)
    other = copy.deepcopy(model)
    fresh = Shampoo(other.parameters(), **SETTINGS)
    reset(optimizer)
    steps(model, optimizer, 11, 23)
    steps(other, fresh, 11, 23)
    assert torch.equal(weights(model), weights(other))
    assert "'param_0'" in caplog.text
    assert "begin anew" in caplog.text


def test_one_parameters_reset_leaves_the_others_alone() -> None:
    model = a_model()
    optimizer = Shampoo(model.parameters(), **SETTINGS)
    train(model, optimizer, range(11))
    blocks = in_force(optimizer)
    del optimizer.state[model[0].weight]
    train(model, optimizer, range(11, 12))
    assert in_force(optimizer) == blocks - 4


@pytest.mark.parametrize("turn", [torch.Tensor.clone, lambda t: t.double(), lambda t: t.to(torch.bfloat16)])
def test_moments_that_were_converted_keep_their_blocks(turn: Callable[[torch.Tensor], torch.Tensor]) -> None:
    model = a_model()
    optimizer = Shampoo(model.parameters(), **SETTINGS)
    train(model, optimizer, range(8))
    blocks = in_force(optimizer)
    for state in optimizer.state.values():
        state |= {key: turn(value) for key, value in state.items() if isinstance(value, torch.Tensor)}
    train(model, optimizer, range(8, 9))
    assert in_force(optimizer) == blocks
    assert all(state["exp_avg"].dtype == torch.float32 for state in optimizer.state.values())


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "copying", [copy.copy, copy.deepcopy, pickle.dumps, lambda o: torch.save(o, "/dev/null")],
    ids=["copy", "deepcopy", "pickle", "torch.save"],
)  # fmt: skip
def test_a_copy_is_refused_when_it_is_made(copying: Callable[[Shampoo], object]) -> None:
    with pytest.raises(TypeError, match="make a new one, and give it this one's state_dict"):
        copying(Shampoo(a_model().parameters(), **SETTINGS))


def without_a_number(state: dict[str, Any]) -> None:
    del state["state"][0]["blocks"]["0"]["updates"]


def of_other_shapes(state: dict[str, Any]) -> None:
    state["state"][0]["blocks"]["0"]["factors"]["0"] = torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["param_groups"].append(copy.deepcopy(s["param_groups"][0])), "2 param groups, but this .* has 1"),
        (lambda s: s["param_groups"][0]["params"].pop(), "5 parameters in the checkpoint, but 6 here"),
        (lambda s: s.pop("param_groups"), "no 'state' and 'param_groups'"),
        (lambda s: s["state"][0].pop("blocks"), r"lacks the factors of 4 of this rank's 10 blocks, param_0\[0\] first"),
        (lambda s: s["param_groups"][0].pop("block_size"), "not a state of Shampoo"),
        (without_a_number, r"block param_0\[0\] does not fit: its updates: Field required"),
        (of_other_shapes, r"block param_0\[0\] does not fit: its factors have the shapes"),
    ],
)
def test_states_that_do_not_fit(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    model = a_model()
    optimizer = Shampoo(model.parameters(), **SETTINGS)
    train(model, optimizer, range(5))
    state = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(optimizer.state_dict())
    change(state)
    with pytest.raises(SettingsError, match=message):
        optimizer.load_state_dict(state)
    other = a_model()
    other.load_state_dict(model.state_dict())
    untouched = Shampoo(other.parameters(), **SETTINGS)
    untouched.load_state_dict(before)
    train(model, optimizer, range(5, 9))
    train(other, untouched, range(5, 9))
    assert torch.equal(weights(model), weights(other))


# ---------------------------------------------------------------- what trainers do to a job


def test_a_state_that_was_copied_whole_goes_on() -> None:
    """Whoever moves optimizer state between devices copies all tensors that there are, blocks' too."""
    jobs = [(model := a_model(), Shampoo(model.parameters(), **SETTINGS)) for _ in range(2)]
    for step in range(9):
        for model, optimizer in jobs:
            train(model, optimizer, range(step, step + 1))
        copied = jobs[1][1].state
        for param in list(copied):
            copied[param] = tree_map(lambda leaf: leaf.clone() if torch.is_tensor(leaf) else leaf, copied[param])
    assert torch.equal(weights(jobs[0][0]), weights(jobs[1][0]))


@pytest.mark.parametrize("first", [False, True])
def test_frozen_parameters_may_lie_on_another_device(first: bool) -> None:
    """As the base weights that an adapter's trainer has offloaded."""
    # With roots at every step their schedule does not depend on what else there is.
    settings = {**SETTINGS, "root_interval": 1, "root_overlap": False}
    models = [a_model(), a_model()]
    frozen = nn.Parameter(torch.empty(4, 4, dtype=torch.float32, device="meta"), requires_grad=False)
    own = list(models[0].parameters())
    members = [[frozen, *own] if first else [*own, frozen], list(models[1].parameters())]
    for model, params in zip(models, members, strict=True):
        optimizer = Shampoo(params, **settings)
        train(model, optimizer, range(9))
        assert in_force(optimizer) > 0
    assert torch.equal(weights(models[0]), weights(models[1]))


def test_parameters_put_into_a_group_by_hand_are_refused() -> None:
    """They would never be stepped, without a word."""
    model = a_model()
    optimizer = Shampoo(model.parameters(), **SETTINGS)
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.zeros(4, 4, dtype=torch.float32, device="cpu")))
    with pytest.raises(RuntimeError, match="replaced"):
        train(model, optimizer, range(1))


def test_a_group_added_between_steps_is_no_interrupted_step(caplog: pytest.LogCaptureFixture) -> None:
    model = a_model()
    optimizer = Shampoo(model[0].parameters(), **SETTINGS)
    train(model, optimizer, range(2))
    optimizer.add_param_group({"params": list(model[2].parameters())})
    caplog.clear()
    train(model, optimizer, range(2, 4))
    assert "a step began before" not in caplog.text


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("rms", [None, 0.1])
def test_a_gradient_that_is_not_finite_shows_in_the_weights(value: float, rms: float | None) -> None:
    """As in every optimizer: a matrix that stood still for ever instead would be noticed by nobody."""
    model = a_model()
    optimizer = Shampoo(model.parameters(), **SETTINGS, direction_rms=rms)
    train(model, optimizer, range(8))
    for param in model.parameters():
        param.grad = torch.full_like(param, 1e-3)
    next(model.parameters()).grad[0, 0] = value  # type: ignore[index]
    optimizer.step()
    assert not next(model.parameters()).isfinite().all()
