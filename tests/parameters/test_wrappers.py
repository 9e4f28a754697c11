"""What wrappers make of parameters: flat and distributed shards, quantised weights, and ranks that share no work."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ds_shampoo
from ds_shampoo import SettingsError, Shampoo
from tests.distributed.jobs import SHAMPOO, engine_config
from tests.distributed.pool import WorkerPool

Pools = Callable[[int], WorkerPool]


class Listener(logging.Handler):
    """Keeps what the package logs at WARNING, in any process, but for this machine's having few cores."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "will slow each other down" not in record.getMessage():
            self.said.append(record.getMessage())

    def __enter__(self) -> list[str]:
        logging.getLogger("ds_shampoo").addHandler(self)
        return self.said

    def __exit__(self, *_: object) -> None:
        logging.getLogger("ds_shampoo").removeHandler(self)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def under_fsdp(use_orig_params: bool, strategy: str, whole: bool) -> str:
    """What FSDP's parameters are refused with; with `whole` also the model is handed over."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = FullyShardedDataParallel(
            model(),
            use_orig_params=use_orig_params,
            sharding_strategy=ShardingStrategy[strategy],
            device_id=torch.device("cpu"),
        )
    try:
        Shampoo(wrapped.parameters(), **({"model": wrapped} if whole else {}))  # type: ignore[arg-type]
    except SettingsError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("whole", [False, True], ids=["params", "model"])
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("strategy", ["FULL_SHARD", "SHARD_GRAD_OP"])
def test_fsdp(pools: Pools, use_orig_params: bool, strategy: str, whole: bool) -> None:
    for message in pools(2).run(under_fsdp, use_orig_params, strategy, whole):
        assert "which is part of a FlatParameter of FSDP: matrices are flattened there" in message
        assert "ds_shampoo.initialize" in message


def under_dtensor(kind: str) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh, found = init_device_mesh("cpu", (dist.get_world_size(),)), model()
    if kind == "fsdp2":
        fully_shard(found, mesh=mesh)
    else:
        parallelize_module(found, mesh, {"0": ColwiseParallel()})
    try:
        Shampoo(found.named_parameters(), model=found)
    except SettingsError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["fsdp2", "tensor parallel"])
def test_dtensor(pools: Pools, kind: str) -> None:
    for message in pools(2).run(under_dtensor, kind):
        assert "Shampoo can't train parameter '0.weight', which is a DTensor (FSDP2 or torch's tensor" in message


def on_several_ranks(kind: str) -> list[str]:
    with Listener() as said:
        found: nn.Module = model()
        params: list[Any] = list(found.named_parameters() if kind == "unknown" else found.parameters())
        if kind != "plain":
            found = DistributedDataParallel(found)
        if kind == "more":
            params.append(nn.Parameter(torch.ones(3, 5)))
        Shampoo(params, model=None if kind == "unknown" else found).prepare()
        return said


@pytest.mark.parametrize(
    ("kind", "where"),
    [("plain", "as a plain optimizer"), ("unknown", "as a plain optimizer"), ("more", "under DistributedDataParallel")],
)
def test_ranks_that_share_no_work(pools: Pools, kind: str, where: str) -> None:
    first, second = pools(2).run(on_several_ranks, kind)
    (line,) = [line for line in first if f"built {where} on 2 ranks, which share no work" in line]
    assert "With model=ddp, a DistributedDataParallel module that has all that is trained" in line
    assert any("a parameter of shape (3, 5) is trained whose gradients" in line for line in first) == (kind == "more")
    assert not second


def test_ranks_that_share_work(pools: Pools) -> None:
    for world_size in (1, 2):
        assert pools(world_size).run(on_several_ranks, "ddp") == [[]] * world_size


def warned_under_deepspeed(stage: int, kind: str) -> list[str]:
    """What is logged at WARNING for a model of flat parameters, one of nothing but an embedding, or an ordinary one."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if kind == "flat":
                self.weight = nn.Parameter(torch.ones(16))
            elif kind == "embedding":
                self.embedding = nn.Embedding(8, 4)
            else:
                self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            if kind == "flat":
                return (self.weight * x).sum()
            return (self.embedding(x.long()) if kind == "embedding" else self.layer(x.expand(4))).sum()

    with Listener() as said:
        engine, *_ = ds_shampoo.initialize(model=Model(), config=engine_config(SHAMPOO, stage, 2))
        for _ in range(2):
            engine.backward(engine(torch.ones(1)))
            engine.step()
        engine.destroy()
        return said


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_nothing_preconditioned_under_deepspeed(pools: Pools, stage: int) -> None:
    first, second = pools(2).run(warned_under_deepspeed, stage, "flat")
    assert [
        line for line in first if "preconditions no parameter here" in line and "may have flattened" in line
    ] == first
    assert len(first) == 1
    assert not second
    first, _ = pools(2).run(warned_under_deepspeed, stage, "embedding")
    assert len(first) == 1
    assert "Of 1 parameters 1: embedding (embedding: diagonal)" in first[0]
    assert pools(2).run(warned_under_deepspeed, stage, "ordinary") == [[], []]


def logged(groups: Any, **settings: Any) -> list[tuple[int, str]]:
    """What a plain optimizer logs over some steps beside its table."""
    said: list[tuple[int, str]] = []

    class All(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append((record.levelno, record.getMessage()))

    logger, handler = logging.getLogger("ds_shampoo"), All()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        optimizer = Shampoo(groups, **settings)
        for _ in range(3):
            for param in (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad):
                param.grad = torch.ones_like(param)
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.describe()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return [(level, line) for level, line in said if "━" not in line]


def flattened(*layers: nn.Module) -> nn.Parameter:
    """A 1-D view of matrices, as wrappers hand over."""
    return nn.Parameter(torch.cat([p.detach().reshape(-1) for layer in layers for p in layer.parameters()]))


def test_flat_views_are_said_once() -> None:
    ((level, line),) = logged([flattened(*model())])
    assert level == logging.WARNING
    assert "Of 1 parameters 1: fewer than two dims above 1. 92 of 92 trained elements" in line
    assert "'param_0' has 92): a wrapper may have flattened or sharded them" in line


def test_every_reason_is_counted() -> None:
    layers, embedding = model(), nn.Embedding(5, 4)
    layers[0].requires_grad_(False)
    named = [*layers.named_parameters(), ("wte.weight", embedding.weight)]
    ((level, line),) = logged([{"params": named, "max_preconditioner_dim": 2}])
    assert level == logging.WARNING
    assert "Of 5 parameters" in line
    for reason in ("2: not trained", "1: every dim is above", "1: embedding (", "1: fewer than two dims"):
        assert reason in line
    assert "flattened" not in line


def test_mostly_flat() -> None:
    """One small layer beside a flattened model is preconditioned, but not what the user means."""
    big = nn.Parameter(torch.zeros(2**19))
    ((level, line),) = logged([("big", big), ("weight", nn.Parameter(torch.ones(4, 4)))])
    assert level == logging.WARNING
    assert line.startswith("524,288 of 524,304 trained elements lie in parameters of one dimension ('big' has")
    assert not logged([("bias", nn.Parameter(torch.ones(400))), ("weight", nn.Parameter(torch.ones(4, 4)))])


def test_a_wish_is_no_warning() -> None:
    ((level, line),) = logged([{"params": [nn.Parameter(torch.ones(4, 4))], "preconditioned": False}])
    assert level == logging.INFO
    assert "Of 1 parameters 1: preconditioned: false." in line


@pytest.mark.parametrize(
    ("made", "named"),
    [
        (lambda: nn.Parameter(torch.ones(2, 2, dtype=torch.complex64)), "torch.complex64"),
        (lambda: nn.Parameter(torch.ones(2, 2, dtype=torch.complex128)), "torch.complex128"),
        (lambda: nn.Parameter(torch.ones(2, 2).to(torch.float8_e4m3fn)), "torch.float8_e4m3fn"),
        (lambda: nn.Parameter(torch.ones(2, 2).to_sparse()), "of layout torch.sparse_coo"),
        (lambda: nn.Parameter(torch.ones(2, 2).to_sparse_csr()), "of layout torch.sparse_csr"),
        (lambda: nn.LazyLinear(3).weight, "not initialised"),
        (lambda: nn.Parameter(torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])), "of layout torch.strided"),
        (lambda: nn.Parameter(torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)), "NestedTensor"),
    ],
    ids=["complex64", "complex128", "float8", "coo", "csr", "lazy", "nested", "jagged"],
)
@pytest.mark.filterwarnings("ignore")
def test_what_can_not_be_trained(made: Callable[[], Tensor], named: str) -> None:
    with pytest.raises(SettingsError, match=f"Shampoo can't train parameter 'w', which is .*{named}.*: "):
        Shampoo([("w", made())])


@pytest.mark.parametrize(
    "made",
    [
        lambda: torch.zeros(36, 1, dtype=torch.uint8),
        lambda: torch.zeros(6, 6, dtype=torch.int8),
        lambda: torch.zeros(6, 6, dtype=torch.bool),
        lambda: torch.quantize_per_tensor(torch.ones(6, 6), 0.1, 0, torch.qint8),
    ],
    ids=["packed", "int8", "bool", "qint8"],
)
@pytest.mark.filterwarnings("ignore")
def test_what_nobody_trains_is_left_out(made: Callable[[], Tensor]) -> None:
    frozen = made()
    base = nn.Parameter(frozen, requires_grad=False)
    weight = nn.Parameter(torch.ones(6, 6))
    optimizer = Shampoo([base, weight], root_interval=2)
    alone = Shampoo([nn.Parameter(torch.ones(6, 6))], root_interval=2)
    for step in range(6):
        for param in (weight, alone.param_groups[0]["params"][0]):
            param.grad = torch.randn(6, 6, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        alone.step()
    assert torch.equal(weight, alone.param_groups[0]["params"][0])
    assert f"none: not trained ({frozen.dtype})" in optimizer.describe()
    assert not optimizer.state.get(base)
    again = Shampoo([base, nn.Parameter(weight.detach().clone())], root_interval=2)
    again.load_state_dict(optimizer.state_dict())
    assert again.metrics()["owned_blocks"] == 1
