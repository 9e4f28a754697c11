"""What the fp32 products of a step may round, whatever the job around it allows."""

from collections.abc import Iterator
from typing import Literal

import pytest
import torch

from ds_shampoo import Shampoo
from ds_shampoo.algorithm.precision import MatmulPrecision, matmul_precision

by_backend = pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="torch before 2.9 has one setting for all"
)


@pytest.fixture(params=["highest", "high", "medium"])
def job_wide(request: pytest.FixtureRequest) -> Iterator[str]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def trained(precision: MatmulPrecision, preconditioner: Literal["shampoo", "spectral"] = "shampoo") -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(128, 96, generator=generator))
    optimizer = Shampoo(
        [weight],
        lr=1e-2,
        root_overlap=False,
        root_interval=2,
        matmul_precision=precision,
        preconditioner=preconditioner,
    )
    for _ in range(10):
        weight.grad = torch.randn(128, 96, generator=generator)
        optimizer.step()
    return weight.detach()


def test_the_job_gets_its_own_back(job_wide: str) -> None:
    with pytest.raises(ZeroDivisionError), matmul_precision("high"):
        _ = 1 / 0
    assert torch.get_float32_matmul_precision() == job_wide


@by_backend
@pytest.mark.parametrize(("precision", "cpu"), [("highest", "ieee"), ("high", "tf32"), ("medium", "bf16")])
def test_the_block_alone_has_its_precision(precision: MatmulPrecision, cpu: str) -> None:
    with matmul_precision(precision):
        assert torch.backends.mkldnn.matmul.fp32_precision == cpu


@by_backend
def test_a_job_that_sets_backends_one_by_one() -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with matmul_precision("highest"):
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_what_the_job_allows_changes_no_step(job_wide: str) -> None:
    now = trained("highest")
    torch.set_float32_matmul_precision("highest")
    assert torch.equal(now, trained("highest")), job_wide


def test_rounded_products_stay_near() -> None:
    """Ten steps of norm 1 per element at most; bfloat16 inputs have a relative error of 2^-8."""
    exact, rounded = trained("highest"), trained("medium")
    assert (exact - rounded).abs().max() <= 10 * 1e-2 * 2**-8 * 4


def test_spectral_iterates_in_bf16_under_medium_alone() -> None:
    """On any device, and within the few per cent of `test_an_iteration_in_bf16_stays_near`."""
    start = torch.randn(128, 96, generator=torch.Generator().manual_seed(0))
    exact, high, medium = (trained(precision, "spectral") for precision in ("highest", "high", "medium"))
    moved = (exact - start).norm()
    assert (exact - high).norm() / moved < 1e-2
    assert 1e-3 < (exact - medium).norm() / moved < 0.05
