"""Statistics and directions of stacks against one block at a time in fp64."""

import pytest
import torch

from ds_shampoo.algorithm.blocks import cut
from ds_shampoo.algorithm.preconditioners import ShampooPreconditioner, SpectralPreconditioner, shampoo
from ds_shampoo.algorithm.preconditioners.shampoo import mode_product
from ds_shampoo.algorithm.statistics import accumulate, matricize
from ds_shampoo.algorithm.triangle import packed_numel, unpack


@pytest.mark.parametrize("order", [3, 128, 256, 300, 600])
@pytest.mark.parametrize("beta", [0.9, 1.0])
def test_the_lower_triangle_is_all_of_the_factor(order: int, beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    factor = torch.zeros(2, packed_numel(order))
    expected = torch.zeros(2, order, order, dtype=torch.float64)
    for _ in range(3):
        grad = torch.randn(2, order, 40, generator=generator)
        accumulate(factor, grad, 0, beta)
        product = grad.double() @ grad.double().mT
        expected = beta * expected + (1 - beta if beta < 1 else 1.0) * product
    full = unpack(factor, order)
    assert (full - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert torch.equal(full, full.mT)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_mode_products_and_unfoldings_of_three_dims(dim: int) -> None:
    generator = torch.Generator().manual_seed(0)
    stacked = torch.randn(2, 3, 4, 5, generator=generator)
    matrix = torch.randn(2, stacked.shape[dim + 1], stacked.shape[dim + 1], generator=generator)
    matrix = matrix + matrix.mT
    expected = torch.stack(
        [torch.tensordot(m, s, dims=([1], [dim])).movedim(0, dim) for m, s in zip(matrix, stacked, strict=True)]
    )
    found = torch.empty_like(stacked)
    mode_product(matrix, stacked, dim, found)
    assert torch.allclose(found, expected, atol=1e-5)
    assert matricize(stacked, dim).shape == (2, stacked.shape[dim + 1], 60 // stacked.shape[dim + 1])


def test_slots_left_out_of_an_update_keep_their_statistics() -> None:
    blocked = cut("w", (8, 4), block_size=4)
    assert blocked is not None
    generator = torch.Generator().manual_seed(0)
    grads = torch.randn(2, 4, 4, generator=generator)
    one, both = (ShampooPreconditioner(blocked.blocks, torch.device("cpu")) for _ in range(2))
    one.update(grads, [1], 0.5)
    both.update(grads, [0, 1], 0.5)
    assert one.updates == [0, 1]
    assert not one.factors[0][0].any()
    assert torch.equal(one.factors[0][1], both.factors[0][1])


def test_block_state_of_other_shapes_is_refused() -> None:
    blocked, other = cut("w", (4, 4), block_size=4), cut("w", (4, 4), block_size=2)
    assert blocked is not None
    assert other is not None
    stack = ShampooPreconditioner(blocked.blocks, torch.device("cpu"))
    state = ShampooPreconditioner(other.blocks, torch.device("cpu")).block_state(0)
    with pytest.raises(ValueError, match=r"w\[0\].*another block_size, model or release"):
        stack.load_block_state(0, state)


@pytest.mark.parametrize("build", [ShampooPreconditioner, SpectralPreconditioner])
def test_roots_kept_in_bf16_are_widened_for_the_products(
    build: type[ShampooPreconditioner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shampoo, "_CONVERTED_AT_ONCE", 2 * 48**2)  # two of the three blocks, then one
    blocked = cut("w", (48, 3 * 48), block_size=48)
    assert blocked is not None
    generator = torch.Generator().manual_seed(0)
    device, stacked = torch.device("cpu"), torch.randn(3, 48, 48, generator=generator)
    kept, widened = build(blocked.blocks, device, torch.bfloat16), build(blocked.blocks, device)
    for root, same in zip(kept.roots, widened.roots, strict=True):
        root.copy_(torch.eye(48) + 0.1 * torch.randn(3, 48, 48, generator=generator))
        same.copy_(root)
    found, expected = (each.apply(stacked.clone(), torch.empty_like(stacked)) for each in (kept, widened))
    assert torch.equal(found, expected)


def test_what_rounding_of_roots_to_bf16_does_to_a_direction() -> None:
    """The bound of docs/algorithm.md, section 3: twice 2^-9 of the product of magnitudes, to first order."""
    blocked = cut("w", (96, 96), block_size=96)
    assert blocked is not None
    generator = torch.Generator().manual_seed(0)
    device, vector = torch.device("cpu"), torch.randn(1, 96, 96, generator=generator)
    exact, rounded = (ShampooPreconditioner(blocked.blocks, device, d) for d in (torch.float32, torch.bfloat16))
    for root, low in zip(exact.roots, rounded.roots, strict=True):
        root.copy_(torch.randn(1, 96, 96, generator=generator))
        low.copy_(root)
    found, expected = (each.apply(vector.clone(), torch.empty_like(vector)) for each in (rounded, exact))
    magnitude = exact.roots[0].abs() @ vector.abs() @ exact.roots[1].abs()
    assert ((found - expected).abs() <= (2**-8 + 2**-16) * magnitude).all()
    assert not torch.equal(found, expected)
