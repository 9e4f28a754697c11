"""The stacked products of the step against fp64, and that neither the stack nor the route changes what they mean."""

from __future__ import annotations

import pytest
import torch

from ds_shampoo.algorithm import products
from ds_shampoo.algorithm.precision import matmul_precision
from ds_shampoo.algorithm.triangle import packed_numel, unpack

# The error bound of an fp32 inner product of length k, in ulps of the sum of absolute products (Higham 2002, 3.1).
ULP = 2.0**-24


@pytest.fixture(params=["as here", "torch"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(products, "onednn_product", lambda: None)


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("shape", [(3, 128, 160, 136), (2, 520, 64, 70), (4, 16, 8, 24), (1, 1, 300, 1)])
def test_multiply_is_an_fp32_product(shape: tuple[int, int, int, int]) -> None:
    n, m, k, columns = shape
    left, right, out = torch.randn(n, m, k), torch.randn(n, k, columns), torch.full((n, m, columns), torch.nan)
    with matmul_precision("highest"):
        products.multiply(left, right, out)
    bound = k * ULP * (left.abs().double() @ right.abs().double())
    assert ((out - left.double() @ right.double()).abs() <= bound).all()


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("order", [24, 160])
def test_multiply_add_is_a_product_and_a_sum(order: int) -> None:
    square, wide, out = torch.randn(2, order, order), torch.randn(2, order, 3 * order), torch.empty(2, order, 3 * order)
    with matmul_precision("highest"):
        products.multiply_add(square, wide, wide, alpha=0.5, beta=-3.0, out=out)
    exact = 0.5 * square.double() @ wide.double() - 3 * wide.double()
    bound = order * ULP * (square.abs().double() @ wide.abs().double()) + 8 * ULP * wide.abs()
    assert ((out - exact).abs() <= bound).all()


@pytest.mark.usefixtures("route")
@pytest.mark.parametrize("beta", [0.5, 1.0])
@pytest.mark.parametrize("order", [20, 128, 300, 600])
def test_gram_matrices_accumulate_in_packed_triangles(order: int, beta: float) -> None:
    weight = 1 - beta or 1.0
    first, rows = torch.randn(2, packed_numel(order)), torch.randn(2, 150, order).mT
    target = first.clone()
    with matmul_precision("highest"):
        products.accumulate_gram(target, rows, beta)
    expected = beta * unpack(first, order).double() + weight * rows.double() @ rows.double().mT
    assert torch.allclose(unpack(target, order).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("order", [128, 512])
def test_a_block_gets_the_same_bits_in_any_stack(order: int) -> None:
    left, right = torch.randn(3, order, order), torch.randn(3, order, order)
    together, alone = torch.empty_like(left), torch.empty_like(left)
    grams, own = (torch.zeros(3, packed_numel(order)) for _ in range(2))
    with matmul_precision("highest"):
        products.multiply(left, right, together)
        products.accumulate_gram(grams, left, 0.5)
        for i in range(3):
            products.multiply(left[i : i + 1], right[i : i + 1], alone[i : i + 1])
            products.accumulate_gram(own[i : i + 1], left[i : i + 1], 0.5)
    assert torch.equal(together, alone)
    assert torch.equal(grams, own)


def test_small_products_and_other_dtypes_are_left_to_torch() -> None:
    block = torch.randn(1, 128, 128)
    assert products._onednn_for(block, 128) is products.onednn_product()
    assert products._onednn_for(block[:, :8], 8) is None
    assert products._onednn_for(block.bfloat16(), 128) is None
