"""Shampoo objects and callables in one process: orders of import, what is said, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from ds_shampoo import SettingsError, Shampoo, register
from ds_shampoo.frameworks.deepspeed import construction
from ds_shampoo.parameters.unbound import to_be_bound
from tests.conftest import ROOT
from tests.distributed import binding_jobs
from tests.distributed.jobs import SHAMPOO, engine_config
from tests.distributed.pool import WorkerPool

Pools = Callable[[int], WorkerPool]

PROGRAM = """
import os, sys
{first}
import torch
model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
{second}
import deepspeed
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={{
    "train_batch_size": 4, "zero_allow_untested_optimizer": True, "zero_optimization": {{"stage": 1}},
}})
loss = engine(torch.ones(4, 8)).square().mean()
engine.backward(loss)
engine.step()
print("found", type(engine.basic_optimizer.layout).__name__, engine.basic_optimizer.metrics()["owned_blocks"])
"""
MADE = "import ds_shampoo\noptimizer = ds_shampoo.Shampoo(model.parameters())\nwithout = 'deepspeed' not in sys.modules"
ORDERS = {
    "the package, the object, DeepSpeed": ("import ds_shampoo", f"{MADE}\nassert without"),
    "DeepSpeed, the package, the object": ("import deepspeed", MADE),
    "the engine's module alone": ("import deepspeed.runtime.engine", MADE),
}


@pytest.mark.parametrize("order", ORDERS)
def test_orders_of_import(order: str) -> None:
    first, second = ORDERS[order]
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(first=first, second=second)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert "found FlatLayout 2" in found.stdout, found.stderr[-2000:]


def test_registering_again_wraps_nothing_again() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    before, finders = DeepSpeedEngine._configure_optimizer, len(sys.meta_path)
    register()
    assert DeepSpeedEngine._configure_optimizer is before
    assert len(sys.meta_path) == finders


def another_release(method: Callable[..., None] | None) -> Any:
    """A DeepSpeed whose engines get their optimizer otherwise."""

    class DeepSpeedEngine:
        def __init__(self, model: Any = None, optimizer: Any = None, config: Any = None) -> None:
            self.basic_optimizer = optimizer(model.parameters()) if callable(optimizer) else optimizer

    if method is not None:
        DeepSpeedEngine._configure_optimizer = method  # type: ignore[attr-defined]
    module = ModuleType("deepspeed.runtime.engine")
    module.DeepSpeedEngine = DeepSpeedEngine  # type: ignore[attr-defined]
    construction._wrap(module)
    construction._wrap(module)
    return DeepSpeedEngine


@pytest.mark.parametrize("method", [None, lambda self, optimizer: None], ids=["gone", "other arguments"])
def test_a_deepspeed_that_has_moved_on_is_refused(method: Any) -> None:
    engine_type, model = another_release(method), nn.Linear(3, 3)
    moved = r"this DeepSpeed has no deepspeed.runtime.engine.DeepSpeedEngine._configure_optimizer\(self, client_opt"
    with pytest.raises(SettingsError, match=moved):
        engine_type(model=model, optimizer=Shampoo(model.parameters()))
    with pytest.raises(SettingsError, match=moved):
        engine_type(model=model, optimizer=Shampoo)
    with pytest.raises(SettingsError, match=moved):
        engine_type(model=model, config={"optimizer": {"type": "Shampoo"}})
    other = torch.optim.SGD(model.parameters())
    assert engine_type(model=model, optimizer=other, config={}).basic_optimizer is other


def test_a_deepspeed_without_engines_is_said(caplog: pytest.LogCaptureFixture) -> None:
    construction._wrap(ModuleType("deepspeed.runtime.engine"))
    assert "this DeepSpeed has no deepspeed.runtime.engine.DeepSpeedEngine" in caplog.text


@pytest.mark.parametrize(
    ("kind", "trains", "said"),
    [
        ("alone", "SGD", ["a Shampoo object was made for parameters that this DeepSpeed engine trains with SGD"]),
        ("taken", "AdamW", ["a Shampoo object was made for parameters that this DeepSpeed engine trains with AdamW"]),
        ("beside", "Shampoo", ['optimizer = {"type": "SGD", ...} in the config does not hold']),
        ("callable beside", "Shampoo", ['optimizer = {"type": "SGD", ...} in the config does not hold']),
        ("named", "SGD", ['optimizer = {"type": "Shampoo", ...} in the config does not hold']),
        ("partly", "SGD", []),
    ],
)
@pytest.mark.parametrize("stage", [0, 2])
def test_what_is_said(pools: Pools, stage: int, kind: str, trains: str, said: list[str]) -> None:
    ((found, optimizer),) = pools(1).run(binding_jobs.warned, engine_config({}, stage, 1), kind)
    assert optimizer == trains
    assert len(found) == len(said), found
    assert all(message.startswith(beginning) for message, beginning in zip(found, said, strict=True)), found


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("stepped", "the Shampoo object has the state of 1 steps"),
        ("loaded", "the Shampoo object has the state of 1 steps"),
        ("replaced", "other tensors stand in param group 0 than the Shampoo object was made with"),
        ("another's", "the Shampoo object is the optimizer of another engine"),
    ],
)
def test_what_is_refused(pools: Pools, stage: int, kind: str, message: str) -> None:
    (found,) = pools(1).run(binding_jobs.refused, engine_config(SHAMPOO, stage, 1), kind)
    assert found.startswith(message)


@pytest.mark.parametrize("way", ["config", "callable"])
def test_iterators_in_param_groups_are_left_to_the_optimizer(pools: Pools, way: str) -> None:
    job, config = binding_jobs.by_ways, engine_config(SHAMPOO, 1, 1)
    ((plain,),) = pools(1).run(job, [way], config, 3)
    ((found,),) = pools(1).run(job, [way], config, 3, groups=binding_jobs.generated)
    assert found.losses == plain.losses


def test_patterns_are_about_the_names_that_were_passed(pools: Pools) -> None:
    assert pools(1).run(binding_jobs.refused, engine_config(SHAMPOO, 1, 1), "pattern") == [""]


@pytest.mark.parametrize("stage", [2, 3])
def test_keys_that_are_missing_are_named(pools: Pools, stage: int) -> None:
    ((untested, offloaded, other),) = pools(1).run(binding_jobs.keys_named, stage)
    assert '"zero_allow_untested_optimizer": true' in untested
    assert '"zero_force_ds_cpu_optimizer": false' in offloaded
    assert '"zero_force_ds_cpu_optimizer": false' in other


@pytest.mark.parametrize("stage", [0, 1])
def test_a_shampoo_that_nobody_knows_of_is_refused(pools: Pools, stage: int) -> None:
    (message,) = pools(1).run(binding_jobs.named_otherwise, stage)
    assert message.startswith("DeepSpeed made a Shampoo that Shampoo does not know of: name it")


def test_what_is_made_to_be_bound_can_be_used_all_the_same() -> None:
    """What a callable makes beside the optimizer that it returns."""
    found = []
    for waits in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(6, 6)
        if waits:
            with to_be_bound():
                optimizer = Shampoo(model.parameters())
            assert not optimizer.state
        else:
            optimizer = Shampoo(model.parameters())
        for _ in range(3):
            model(torch.ones(2, 6)).square().mean().backward()
            optimizer.step()
        found.append(model.weight.detach())
    assert torch.equal(*found)


def test_patterns_of_what_is_made_to_be_bound_are_checked_at_the_first_step() -> None:
    model = nn.Linear(6, 6)
    with to_be_bound():
        optimizer = Shampoo(model.parameters(), roles={"head*": "head"})
    for _ in range(2):
        with pytest.raises(SettingsError, match="has the pattern 'head\\*', which matches no parameter"):
            optimizer.step()


def test_parts_of_what_is_made_to_be_bound_are_checked_at_every_first_step() -> None:
    model = nn.Linear(6, 6)
    with to_be_bound():
        optimizer = Shampoo(model.named_parameters(), fused_parts={"weight": 5})
    for _ in range(2):
        with pytest.raises(SettingsError, match="'fused_parts' says 5 of 'weight'"):
            optimizer.step()


def test_what_the_json_refuses_has_its_name(pools: Pools) -> None:
    (message,) = pools(1).run(binding_jobs.refused_by_json, engine_config(SHAMPOO, 0, 1))
    assert "can't train parameter 'inner.odd', which is torch.complex64" in message


def test_a_group_that_is_added_between_steps_begins_no_step(pools: Pools) -> None:
    ((between, warnings, first, second),) = pools(1).run(binding_jobs.added_between_steps, engine_config({}, 0, 1))
    assert between
    assert not warnings
    assert first.startswith(
        "Shampoo setting 'betas[0]' = 2.0"
    )  # a wrong setting is refused, and nothing is broken by that
    assert second == ""
