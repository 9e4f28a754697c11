"""Independent matrices in one parameter, as a layer's experts: stepped as if each were a parameter of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn

from ds_shampoo import Shampoo
from ds_shampoo.algorithm import cost
from ds_shampoo.algorithm.blocks import cut, matrix_shape

EXPERTS, STEPS = 4, 24
SETTINGS = {"lr": 0.02, "block_size": 8, "root_interval": 3, "matrix_epsilon": 1e-3, "root_overlap": False}


def stacked(tensor: Tensor) -> dict[str, nn.Parameter]:
    return {"experts.w": nn.Parameter(tensor.clone())}


def separate(tensor: Tensor) -> dict[str, nn.Parameter]:
    return {f"w{i}": nn.Parameter(each.clone()) for i, each in enumerate(tensor)}


def gradient(step: int, shape: tuple[int, ...]) -> Tensor:
    """Experts of very different scales; one gets no tokens at first, another none for a time, a third never any."""
    grads = torch.randn(shape, generator=torch.Generator().manual_seed(step), dtype=torch.float32)
    grads *= torch.tensor([1.0, 1e-3, 30.0, 1.0], dtype=torch.float32).view(-1, *(1,) * (len(shape) - 1))
    if step < 5:
        grads[0] = 0
    if 6 <= step < 16:
        grads[1] = 0
    grads[3] = 0
    return grads


def trained(shape: tuple[int, ...], settings: dict[str, Any], together: bool) -> tuple[Tensor, Shampoo]:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(99), dtype=torch.float32)
    params = stacked(start) if together else separate(start)
    optimizer = Shampoo(params.items(), **{**SETTINGS, **settings})
    for step in range(STEPS):
        grads = gradient(step, shape)
        for parameter, grad in zip(params.values(), [grads] if together else grads, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
    return torch.stack([p.detach() for p in params.values()]).view(shape), optimizer


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ((EXPERTS, 12, 10), {}),
        ((EXPERTS, 6, 5), {"block_size": 64}),
        ((EXPERTS, 12, 10), {"preconditioner": "spectral"}),
        ((EXPERTS, 9, 17), {"preconditioner": "spectral", "direction_rms": 0.2, "momentum": "after"}),
        ((EXPERTS, 12, 10), {"grafting": "none", "lr": 1e-3}),
        ((EXPERTS, 12, 10), {"grafting": "adam_normalized"}),
        ((EXPERTS, 12, 10), {"grafting": "rmsprop_normalized", "start_preconditioning_step": STEPS + 1}),
        ((EXPERTS, 30, 5), {"max_preconditioner_dim": 20}),
        ((EXPERTS, 40, 3), {"max_factor_ratio": 2.0}),
        ((EXPERTS, 6, 3, 2, 2), {"merge_small_dims": True, "block_size": 16}),
        ((EXPERTS, 6, 5, 4), {"merge_small_dims": False, "preconditioner": "spectral"}),
        ((EXPERTS, 9, 17), {"preconditioner": "polar"}),
        ((EXPERTS, 1, 6, 5), {}),
        ((EXPERTS, 1, 7), {"grafting": "adam_normalized"}),
    ],
    ids=str,
)
def test_they_step_as_parameters_of_their_own(shape: tuple[int, ...], settings: dict[str, Any]) -> None:
    together, optimizer = trained(shape, settings, together=True)
    apart, other = trained(shape, settings, together=False)
    torch.testing.assert_close(together, apart, rtol=1e-6, atol=1e-7)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(99), dtype=torch.float32)
    assert not torch.equal(together[0], start[0])
    assert torch.equal(together[3], start[3])  # no gradient ever: no other expert's norm moves it
    for key in ("preconditioned_blocks", "root_updates"):
        assert optimizer.metrics()[key] == other.metrics()[key]


def test_taken_for_one_tensor_the_experts_mix() -> None:
    shape = (EXPERTS, 12, 10)
    mixed, _ = trained(shape, {"batch_dims": {"experts.w": 0}}, together=True)
    apart, _ = trained(shape, {}, together=False)
    assert float((mixed - apart).norm() / apart.norm()) > 0.01


shapes = st.lists(st.integers(1, 7), min_size=2, max_size=4).map(tuple)


@hypothesis_settings(deadline=None)
@given(shapes, st.integers(2, 5), st.integers(1, 8), st.booleans(), st.none() | st.integers(1, 7), st.booleans())
def test_a_batch_is_cut_as_each_of_its_matrices(
    shape: tuple[int, ...], batch: int, block_size: int, merge: bool, limit: int | None, spare: bool
) -> None:
    settings: dict[str, Any] = {
        "block_size": block_size, "merge": merge, "max_preconditioner_dim": limit,
        "max_factor_ratio": 2.0 if spare else None,
    }  # fmt: skip
    one = cut("w", shape, **settings)
    found = cut("w", (batch, *shape), batch=batch, **settings)
    rows = cut("w", (batch * shape[0], *shape[1:]), batch=batch, **settings)
    assert found == rows
    assert (one is None) == (found is None)
    if one is None or found is None:
        return
    assert found.shape == (batch, *one.shape)
    assert [block.index for block in found.blocks] == list(range(batch * len(one.blocks)))
    for number, block in enumerate(found.blocks):
        member, place = divmod(number, len(one.blocks))
        alone = one.blocks[place]
        assert block.starts == block.origin == (member, *alone.starts)
        assert block.matrix_shape == alone.shape
        assert block.factor_dims == alone.factor_dims
        for preconditioner in ("shampoo", "spectral", "polar"):
            assert cost.step_flops(block, 1, 10, preconditioner) == cost.step_flops(alone, 1, 10, preconditioner)
        assert cost.state_bytes(block) == cost.state_bytes(alone)


@pytest.mark.parametrize(
    ("shape", "batch", "each"),
    [((8, 3, 4), 8, (3, 4)), ((2, 4, 3, 5), 8, (3, 5)), ((24, 4), 8, (3, 4)), ((3, 4), 1, (3, 4)), ((8, 3), 8, (3,))],
)
def test_where_the_matrices_lie(shape: tuple[int, ...], batch: int, each: tuple[int, ...]) -> None:
    assert matrix_shape(shape, batch) == each


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(7, 3\) does not divide: 2 matrices are left over"):
        matrix_shape((7, 3), 2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_table_s_bytes_are_those_that_are_kept(dtype: str) -> None:
    named = {"experts.w": (EXPERTS, 12, 10), "tall": (300, 2), "wide": (3, 200), "square": (40, 40)}
    params = [(name, nn.Parameter(torch.zeros(shape))) for name, shape in named.items()]
    optimizer = Shampoo(params, block_size=64, max_factor_ratio=4.0, root_dtype=dtype)
    for group in (subgroup.sharded for subgroup in optimizer.subgroups()):
        kept = sum(
            tensor.nbytes for stack in group.stacks for tensor in (*stack.factors, *stack.roots, *stack.previous)
        )
        assert kept == sum(group.table.state_bytes) > 0
        assert all(max(block.factor_dims) ** 2 <= 4 * block.numel for block in group.table.blocks)
