"""Statistics and directions of stacks against one block at a time in fp64."""

import pytest
import torch

from ds_shampoo.algorithm.blocks import cut
from ds_shampoo.algorithm.preconditioner import ShampooPreconditioner, mode_product
from ds_shampoo.algorithm.statistics import accumulate, matricize, symmetric


@pytest.mark.parametrize("order", [3, 128, 256, 300, 600])
@pytest.mark.parametrize("beta", [0.9, 1.0])
def test_the_lower_triangle_is_all_of_the_factor(order: int, beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    factor = torch.zeros(2, order, order)
    expected = torch.zeros(2, order, order, dtype=torch.float64)
    for _ in range(3):
        grad = torch.randn(2, order, 40, generator=generator)
        accumulate(factor, grad, 0, beta)
        product = grad.double() @ grad.double().mT
        expected = beta * expected + (1 - beta if beta < 1 else 1.0) * product
    assert (symmetric(factor) - expected).abs().max() <= 1e-6 * expected.abs().max()
    assert torch.equal(symmetric(factor), symmetric(factor).mT)


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
    with pytest.raises(ValueError, match=r"w\[0\].*block_size or the model has changed"):
        stack.load_block_state(0, state)
