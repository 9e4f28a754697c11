"""The prototypes that jobs compare with: what their formulas say of small matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.prototypes import FacebookShampoo, Soap, pseudo_inverse_root
from optimizers import ByRole


class OneMatrix(nn.Module):
    """A model of one hidden matrix."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(value.shape[1], value.shape[0], bias=False)
        self.layer.weight.data = value.clone()


def moves(kind: type[ByRole], grads: list[Tensor], **settings: object) -> list[Tensor]:
    """What each step takes off a matrix, at rate 1."""
    net = OneMatrix(torch.zeros_like(grads[0]))
    optimizer = kind(net, lr=1.0, **settings)
    found = []
    for grad in grads:
        before = net.layer.weight.data.clone()
        net.layer.weight.grad = grad.clone()
        optimizer.step()
        found.append(before - net.layer.weight.data)
    return found


def gradients(rows: int, columns: int, count: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(rows, columns) for _ in range(count)]


def test_a_root_leaves_out_what_rounding_made_of_zero() -> None:
    vectors = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0)))[0]
    values = torch.tensor([16.0, 1.0, 1 / 16, 0.0, 0.0, 0.0])
    root = pseudo_inverse_root((vectors * values) @ vectors.T, 0.25)
    expected = torch.tensor([0.5, 1.0, 2.0, 0.0, 0.0, 0.0])
    torch.testing.assert_close(root, (vectors * expected) @ vectors.T, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("exponent", [0.25, 1 / 3])
def test_shampoo_of_one_gradient_has_its_singular_values_to_a_power(exponent: float) -> None:
    (grad,) = gradients(5, 8, 1)
    (step,) = moves(FacebookShampoo, [grad], exponent=exponent, grafting="sqrt_rows")
    left, values, right = torch.linalg.svd(grad, full_matrices=False)
    expected = left @ torch.diag(values ** (1 - 4 * exponent)) @ right
    torch.testing.assert_close(step, expected * 5**0.5 / expected.norm(), atol=1e-4, rtol=1e-4)


def test_shampoo_has_the_length_of_adam_s_step() -> None:
    grads = gradients(6, 4, 5)
    plain = nn.Parameter(torch.zeros(6, 4))
    adam, lengths = torch.optim.Adam([plain], lr=1.0, betas=(0.8, 0.9), eps=1e-15), []
    for grad in grads:
        before, plain.grad = plain.data.clone(), grad
        adam.step()
        lengths.append((before - plain.data).norm())
    steps = moves(FacebookShampoo, grads, momentum=0.8, grafting_beta=0.9, root_interval=2)
    assert [float(step.norm()) for step in steps] == pytest.approx(list(map(float, lengths)), rel=1e-4)


def test_roots_are_as_old_as_their_interval_says() -> None:
    grads = gradients(4, 4, 4)
    often, rarely = (moves(FacebookShampoo, grads, root_interval=interval) for interval in (1, 3))
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(often, rarely, strict=True)]
    assert same == [True, False, False, True]


def test_soap_turns_with_its_gradients() -> None:
    # Square ones: of a flat one the first basis is any where its null space is.
    grads = gradients(5, 5, 6)
    u, v = (torch.linalg.qr(torch.randn(5, 5))[0] for _ in range(2))
    plain = moves(Soap, grads, basis_interval=2)
    turned = moves(Soap, [u @ grad @ v for grad in grads], basis_interval=2)
    assert not plain[0].any(), "the first gradient only gives the basis"
    for one, other in zip(plain[1:], turned[1:], strict=True):
        torch.testing.assert_close(u @ one @ v, other, atol=1e-3, rtol=1e-3)


def test_soap_where_the_basis_is_the_axes_is_adam() -> None:
    values = [torch.tensor([[3.0, 0.0], [0.0, 1.0]]) * scale for scale in (1.0, 2.0, 0.5, 1.5)]
    steps = moves(Soap, values, momentum=0.9, second_beta=0.95, basis_interval=2)
    plain = nn.Parameter(torch.zeros(2, 2))
    adam = torch.optim.Adam([plain], lr=1.0, betas=(0.9, 0.95))
    for grad, step in zip(values[1:], steps[1:], strict=True):
        before, plain.grad = plain.data.clone(), grad
        adam.step()
        torch.testing.assert_close(step, before - plain.data, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [Soap, FacebookShampoo])
def test_a_matrix_without_a_gradient_stays(kind: type[ByRole]) -> None:
    net = OneMatrix(torch.ones(3, 2))
    kind(net, lr=1.0, weight_decay=0.5).step()
    assert torch.equal(net.layer.weight, torch.ones(3, 2))


def test_a_grafting_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"grafting = 'sgd': must be \"adam\" or \"sqrt_rows\""):
        FacebookShampoo(OneMatrix(torch.ones(3, 2)), grafting="sgd")
