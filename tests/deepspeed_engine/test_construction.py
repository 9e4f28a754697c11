"""How the JSON's Shampoo finds its engine, whatever stands in between, and when the layout is proved."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ds_shampoo import Shampoo
from ds_shampoo.frameworks.deepspeed.construction import engine_being_built
from tests.distributed.jobs import SHAMPOO, build_model, engine_config, engine_of, train
from tests.distributed.pool import WorkerPool

Pools = Callable[[int], WorkerPool]

FRAMES = ["decorator", "partial", "tracer", "lambda", "recursion", "generator"]


@contextlib.contextmanager
def wrapped(kind: str) -> Iterator[None]:
    """`torch.optim.Shampoo` with something of a user's around it."""
    original = torch.optim.Shampoo  # type: ignore[attr-defined]

    @functools.wraps(original)
    def decorator(*positional: Any, **named: Any) -> Any:
        return original(*positional, **named)

    def recursion(*positional: Any, depth: int = 20, **named: Any) -> Any:
        return recursion(*positional, depth=depth - 1, **named) if depth else original(*positional, **named)

    def generator(*positional: Any, **named: Any) -> Any:
        return next(original(*positional, **named) for _ in range(1))

    class Tracer:
        """As those that intercept constructors: callable, and with a `self` of its own in the frame."""

        def __call__(self, *positional: Any, **named: Any) -> Any:
            return decorator(*positional, **named)

    found = {
        "decorator": decorator,
        "partial": functools.partial(decorator),
        "tracer": Tracer(),
        "lambda": lambda *positional, **named: original(*positional, **named),
        "recursion": recursion,
        "generator": generator,
    }
    torch.optim.Shampoo = found[kind]  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.optim.Shampoo = original  # type: ignore[attr-defined]


def layout_under(kind: str, stage: int) -> tuple[str, list[str], bool]:
    """The layout, names and checkpoint hook of an engine that found Shampoo by its import, through a wrapper."""
    with wrapped(kind), engine_of(engine_config(SHAMPOO, stage, 1), plain=True) as engine:
        optimizer = engine.basic_optimizer
        names = sorted({name for piece in optimizer.subgroups() for name in piece.sharded.table.blocked})
        return type(optimizer.layout).__name__, names, "save_checkpoint" in vars(engine)


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("kind", FRAMES)
def test_frames_in_between(pools: Pools, kind: str, stage: int) -> None:
    names = sorted(name for name, _ in build_model().named_parameters())
    expected = ["ReplicatedLayout", "FlatLayout", "FlatLayout", "SubGroupLayout"][stage]
    assert pools(1).run(layout_under, kind, stage) == [(expected, names, True)]


def callables() -> list[str]:
    """The layouts of engines that were given a callable for their optimizer."""
    import deepspeed

    found = []
    settings = {key: value for key, value in SHAMPOO.items() if key != "lr"}
    makers: list[Any] = [
        torch.optim.Shampoo,  # type: ignore[attr-defined]
        functools.partial(torch.optim.Shampoo, lr=1e-3, **settings),  # type: ignore[attr-defined]
        lambda params: torch.optim.Shampoo(params, lr=1e-3, **settings),  # type: ignore[attr-defined]
    ]
    config = engine_config({}, 0, 1)
    del config["optimizer"]
    for maker in makers:
        engine, *_ = deepspeed.initialize(model=build_model(), optimizer=maker, config=config)
        found.append(type(engine.basic_optimizer.layout).__name__)
        engine.destroy()
    return found


def test_callables(pools: Pools) -> None:
    assert pools(1).run(callables) == [["ReplicatedLayout"] * 3]


class InnerLoop(nn.Module):
    """A model that makes an optimizer of its own in its forward pass, as in meta-learning."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4))
        self.made: list[Shampoo] = []

    def forward(self, x: Tensor) -> Tensor:
        fast = nn.Parameter(torch.eye(4))
        self.made.append(torch.optim.Shampoo([fast], lr=0.1))  # type: ignore[attr-defined]
        return (x @ self.weight).square().mean()


def several_engines() -> list[str]:
    """Layouts where one engine is built while others, trained and untrained, stand around it."""
    import deepspeed

    with engine_of(engine_config(SHAMPOO, 1, 1), plain=True) as first:
        reference_config = engine_config({}, 0, 1)
        del reference_config["optimizer"]
        reference, *_ = deepspeed.initialize(model=build_model(), config=reference_config)

        def build(engine: Any, other: Any) -> Any:
            """With engines among the caller's own arguments."""
            with engine_of(engine_config(SHAMPOO, 0, 1), plain=True) as second:
                assert second.basic_optimizer.layout._present_engine() is second
                return type(second.basic_optimizer.layout).__name__

        def plain(engine: Any) -> Any:
            return torch.optim.Shampoo(nn.Linear(3, 3).parameters())  # type: ignore[attr-defined]

        found = [build(first, reference), type(plain(reference).layout).__name__, type(plain(first).layout).__name__]
        assert first.basic_optimizer.layout._present_engine() is first
        model = InnerLoop()
        config = {**engine_config({"lr": 0.1}, 1, 1), "zero_allow_untested_optimizer": True}
        outer, *_ = deepspeed.initialize(model=model, config=config)
        outer(torch.ones(1, 4))
        idle, *_ = deepspeed.initialize(model=InnerLoop(), config=reference_config)
        idle(torch.ones(1, 4))
        found += [type(made.layout).__name__ for made in [*model.made, *idle.module.made]]
        for engine in (outer, reference, idle):
            engine.destroy()
        return found


def test_several_engines(pools: Pools) -> None:
    assert pools(1).run(several_engines) == [["ReplicatedLayout"] + ["WholeLayout"] * 4]


def test_plain_use_stays_plain() -> None:
    assert engine_being_built() is None
    optimizer = torch.optim.Shampoo(nn.Linear(3, 3).parameters())  # type: ignore[attr-defined]
    assert type(optimizer.layout).__name__ == "WholeLayout"


def engines_in_engines() -> list[str]:
    """The layouts of all that is made while a callable makes an engine's optimizer, that one last."""
    import deepspeed

    found: list[str] = []
    config = engine_config({}, 1, 1)
    del config["optimizer"]

    def make(params: Any) -> Any:
        beside = torch.optim.Shampoo(nn.Linear(3, 3).parameters())  # type: ignore[attr-defined]
        with engine_of(engine_config(SHAMPOO, 0, 1), plain=True) as inner:
            found.append(type(inner.basic_optimizer.layout).__name__)
            assert inner.basic_optimizer.layout._present_engine() is inner
        optimizer = Shampoo(params)
        found.append(type(beside.layout).__name__)
        return optimizer

    engine, *_ = deepspeed.initialize(
        model=build_model(), optimizer=make, config={**config, "zero_allow_untested_optimizer": True}
    )
    assert engine.basic_optimizer.layout._present_engine() is engine
    assert engine_being_built() is None
    engine.destroy()
    return [*found, type(engine.basic_optimizer.layout).__name__]


def test_engines_in_engines(pools: Pools) -> None:
    assert pools(1).run(engines_in_engines) == [["ReplicatedLayout", "WholeLayout", "FlatLayout"]]


def change_masters(engine: Any, how: str) -> None:
    """What a user may do with weights once the engine is there, before the first step."""
    import deepspeed
    from deepspeed.utils import safe_get_local_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param

    for parameter in engine.module.parameters():
        if how == "full":
            shape = getattr(parameter, "ds_shape", parameter.shape)
            safe_set_full_fp32_param(parameter, torch.full(shape, 0.25))
        elif how == "local":
            local = safe_get_local_fp32_param(parameter)
            safe_set_local_fp32_param(parameter, torch.full_like(local, 0.25))
    if how == "module":
        parameters = list(engine.module.parameters())
        gathered = any(hasattr(p, "ds_id") for p in parameters)
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0, enabled=gathered):
            engine.module.load_state_dict({k: v + 0.25 for k, v in engine.module.state_dict().items()})


def changed_before_the_first_step(config: dict[str, Any], plain: bool, how: str) -> list[float]:
    with engine_of(config, plain=plain) as engine:
        assert engine.basic_optimizer.state, "the layout is proved before the engine is handed out"
        change_masters(engine, how)
        return train(engine, 0, 3)


@pytest.mark.parametrize("plain", [True, False], ids=["import", "initialize"])
@pytest.mark.parametrize(
    ("stage", "precision", "how"),
    [
        (0, "fp32", "module"),
        (0, "bf16", "module"),
        (1, "fp32", "full"),
        (1, "fp32", "module"),
        (1, "bf16", "full"),
        (2, "bf16", "full"),
        (2, "bf16", "module"),
        (3, "fp32", "full"),
        (3, "bf16", "local"),
        (3, "bf16", "module"),
    ],
)
def test_weights_changed_before_the_first_step(pools: Pools, stage: int, precision: str, how: str, plain: bool) -> None:
    losses = pools(2).run(
        changed_before_the_first_step, engine_config(SHAMPOO, stage, 2, precision=precision), plain, how
    )
    assert losses[0] == losses[1]
    assert all(loss < 20 for loss in losses[0])


def masters_that_are_not() -> str:
    """The message where masters differ from weights when Shampoo first sees them."""
    from ds_shampoo.frameworks.deepspeed.layouts import FlatLayout

    original = FlatLayout.partition

    def shifted(self: Any, members: Any, held: Any) -> Any:
        held[0].data[:5] += 0.5
        return original(self, members, held)

    FlatLayout.partition = shifted  # type: ignore[method-assign]
    try:
        with engine_of(engine_config(SHAMPOO, 1, 1)):
            return ""
    except RuntimeError as error:
        return str(error)
    finally:
        FlatLayout.partition = original  # type: ignore[method-assign]


def test_what_differs_is_said(pools: Pools) -> None:
    (message,) = pools(1).run(masters_that_are_not)
    assert "the fp32 master weights found for" in message
    assert "5 of" in message
    assert "by up to 0.5" in message
    assert "safe_set_full_fp32_param" in message
