"""The cost model is what a step multiplies."""

from __future__ import annotations

import pytest
import torch

from benchmarks.products import products_of, rows, step_of_deepspeeds, step_of_muon, step_of_shampoo
from ds_shampoo.algorithm import products
from ds_shampoo.algorithm.blocks import cut
from ds_shampoo.algorithm.cost import statistics_flops
from ds_shampoo.algorithm.triangle import packed_numel


@pytest.fixture(params=["oneDNN", "torch"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        monkeypatch.setattr(products, "_onednn_for", lambda *_: None)
    elif products.onednn_product() is None:
        pytest.skip("this processor's products are torch's")


@pytest.mark.parametrize(("preconditioner", "units"), [("shampoo", 4), ("spectral", 21), ("polar", 10)])
def test_a_square_block(preconditioner: str, units: int) -> None:
    counted, model = step_of_shampoo((128, 128), preconditioner=preconditioner)
    assert counted.units(128) == units
    assert counted.flops == model


@pytest.mark.parametrize("preconditioner", ["shampoo", "spectral", "polar"])
@pytest.mark.parametrize("shape", [(96, 128), (128, 40)])
def test_the_model_has_what_is_multiplied(shape: tuple[int, int], preconditioner: str) -> None:
    counted, model = step_of_shampoo(shape, preconditioner=preconditioner)
    assert counted.flops == model > 0


def test_of_larger_statistics_a_triangle_is_computed() -> None:
    counted, model = step_of_shampoo((256, 256), preconditioner="polar")
    blocked = cut("weight", (256, 256), block_size=256)
    assert blocked is not None
    whole = statistics_flops(blocked.blocks[0])
    assert counted.flops == model - whole + whole * packed_numel(256) / 256**2
    assert packed_numel(256) < 256**2


def test_muon() -> None:
    assert step_of_muon((128, 128)).units(128) == 15
    assert step_of_deepspeeds((128, 128), "standard").units(128) == 15


def test_the_counter() -> None:
    left, right = torch.ones(3, 4, 5), torch.ones(3, 5, 2)
    counted = products_of(lambda: (torch.bmm(left, right), left[0] @ right[0], left + 1))
    assert (counted.calls, counted.flops) == (2, 2.0 * (3 + 1) * 4 * 5 * 2)


def test_the_table() -> None:
    names = [row[0] for row in rows(32)]
    assert names[:3] == [f'Shampoo, "{name}", 32 x 32' for name in ("shampoo", "spectral", "polar")]
    assert len(names) == 6
