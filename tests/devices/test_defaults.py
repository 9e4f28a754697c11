"""A job's default dtype and default device change no bit of a step, whether set for a moment or for good."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import nn

from ds_shampoo import Shampoo
from ds_shampoo.algorithm import multi_tensor, products
from ds_shampoo.config import Grafting
from tests.devices.defaults import default
from tests.devices.jobs import under_default
from tests.distributed.jobs import SHAMPOO, engine_config
from tests.distributed.pool import WorkerPool

DEFAULTS: list[torch.dtype | str] = [torch.bfloat16, torch.float16, torch.float64, "meta"]
KINDS = list(itertools.product(("shampoo", "spectral", "polar"), get_args(Grafting), ("before", "after")))
# Settings that lead through other code; each is tried with one of the kinds above.
OTHERS: list[dict[str, Any]] = [
    {"root_overlap": True},
    {"root_dtype": "bfloat16", "exchange_dtype": "bfloat16"},
    {"matmul_precision": "medium"},
    {"root_method": "newton"},
    {"root_refresh_threshold": 0.5},
    {"statistics_interval": 3},
    {"start_preconditioning_step": 3},
    {"direction_rms": 0.2},
    {"weight_decay": 0.1, "decoupled_weight_decay": False},
    {"embedding": "one_sided"},
    {"matrix_epsilon": 1e-9},  # a rank-deficient factor: rungs of the chain below the first
]


def model() -> nn.Module:
    """Matrices, an embedding that is not, a convolution whose kernel is merged, rows that get no gradient."""
    with default(torch.float32):
        torch.manual_seed(0)
        return nn.ModuleList(
            [nn.Linear(12, 20), nn.Linear(6, 6, dtype=torch.bfloat16), nn.Embedding(9, 6), nn.Conv2d(4, 5, 3)]
        )


def gradients(layers: nn.Module, step: int) -> None:
    generator = torch.Generator("cpu").manual_seed(step)
    for number, param in enumerate(layers.parameters()):
        grad = torch.randn(param.shape, dtype=torch.float32, device="cpu", generator=generator).to(param.dtype)
        if param.dim() == 2:
            grad[-2:] = 0.0
        param.grad = None if (number + step) % 5 == 0 else grad


def trained(built_under: torch.dtype | str | None, stepped_under: torch.dtype | str | None, **settings: Any) -> Any:
    """Everything that a job leaves behind, after it was saved and loaded half-way."""
    chosen = {"lr": 0.01, "block_size": 8, "root_interval": 2, "root_delay": 1, "root_overlap": False, **settings}
    layers = model()
    products.onednn_product.cache_clear()  # decided at first use, under whatever defaults there are
    multi_tensor.kernels_for.cache_clear()
    with default(built_under):
        optimizer = Shampoo(layers.parameters(), model=layers, **chosen)
        optimizer.describe()
    for step in range(8):
        gradients(layers, step)
        with default(stepped_under):
            if step == 4:
                saved = optimizer.state_dict()
                optimizer = Shampoo(layers.parameters(), model=layers, **chosen)
                optimizer.load_state_dict(saved)
            optimizer.step()
    assert optimizer.metrics()["preconditioned_blocks"] > 0
    return [*(param.detach() for param in layers.parameters()), *leaves(optimizer.state_dict())]


def leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict | list):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from leaves(value)
    elif not callable(tree):
        yield tree


def same(left: list[Any], right: list[Any]) -> bool:
    return len(left) == len(right) and all(
        a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(left, right, strict=True)
    )


@pytest.mark.parametrize(("preconditioner", "grafting", "momentum"), KINDS)
def test_defaults_for_good_change_no_bit(preconditioner: str, grafting: str, momentum: str) -> None:
    chosen = {"preconditioner": preconditioner, "grafting": grafting, "momentum": momentum}
    plain = trained(None, None, **chosen)
    for which in DEFAULTS:
        assert same(trained(which, which, **chosen), plain), which


@pytest.mark.parametrize("other", OTHERS, ids=lambda other: "-".join(other))
def test_nor_with_other_settings(other: dict[str, Any]) -> None:
    plain = trained(None, None, **other)
    for which in DEFAULTS:
        assert same(trained(which, which, **other), plain), which


@pytest.mark.parametrize("which", DEFAULTS, ids=str)
@pytest.mark.parametrize("overlap", [False, True])
def test_nor_when_they_come_and_go(which: torch.dtype | str, overlap: bool) -> None:
    plain = trained(None, None, root_overlap=overlap)
    assert same(trained(which, None, root_overlap=overlap), plain)
    assert same(trained(None, which, root_overlap=overlap), plain)


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (2, "bf16"), (3, "fp32")])
def test_nor_under_deepspeed(pools: Callable[[int], WorkerPool], tmp_path: Path, stage: int, precision: str) -> None:
    """Two ranks, saved and loaded on the way."""
    config = engine_config({**SHAMPOO, "exchange_dtype": "bfloat16"}, stage, 2, precision=precision)
    plain = pools(2).run(under_default, config, None, str(tmp_path / "plain"))
    for which in DEFAULTS:
        found = pools(2).run(under_default, config, which, str(tmp_path / str(which)))
        for (losses, end, state, ready), (own, own_end, own_state, _) in zip(plain, found, strict=True):
            assert ready > 0
            assert own == losses
            assert (own_end == end).all()
            assert own_state == state
