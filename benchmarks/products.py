"""Matrix multiplications of a step, counted while the optimizers' own code runs.

    python benchmarks/products.py [--sides 128 512]

Every product that torch or oneDNN is asked for counts with the flops of its shape, in parts of one of two n x n
matrices: what an accelerator has to do beside elementwise work. Roots are left out: host threads compute them.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.report import table
from ds_shampoo import Shampoo
from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.algorithm.cost import direction_flops, statistics_flops
from ds_shampoo.algorithm.preconditioners import PRECONDITIONERS

# The factors' places among an operation's arguments.
_FACTORS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
# Takes its second factor transposed.
_ONEDNN = "_linear_pointwise"
# In the fourth step all roots are in force, and none are begun.
_STEPS_BEFORE = 3


@dataclass(frozen=True, slots=True)
class Products:
    """What was multiplied: how many calls, and their flops."""

    calls: int
    flops: float

    def units(self, side: int) -> float:
        """In products of two matrices of this side."""
        return self.flops / (2 * side**3)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops: list[float] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in _FACTORS:
            left, right = (args[at] for at in _FACTORS[name])
            self.flops.append(2.0 * math.prod(left.shape) * right.shape[-1])
        elif name == _ONEDNN:
            self.flops.append(2.0 * math.prod(args[0].shape) * args[1].shape[0])
        return func(*args, **(kwargs or {}))


def products_of(work: Callable[[], object]) -> Products:
    """Counts what `work` multiplies on the calling thread."""
    with _Counter() as counter:
        work()
    return Products(len(counter.flops), sum(counter.flops))


def step_of_shampoo(shape: tuple[int, int], preconditioner: str) -> tuple[Products, float]:
    """A step on one matrix that is one block, and the flops that the cost model has for it."""
    param = nn.Parameter(torch.zeros(shape))
    optimizer = Shampoo(
        [("weight", param)], preconditioner=preconditioner, block_size=max(shape), root_interval=100, root_threads=1
    )

    def step() -> None:
        param.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        optimizer.step()

    for _ in range(_STEPS_BEFORE):
        step()
    (block,) = optimizer.turns
    counted = products_of(step)
    assert optimizer.metrics()["preconditioned_blocks"] == 1
    return counted, model_flops(block, preconditioner)


def model_flops(block: Block, preconditioner: str) -> float:
    """Of a step without roots, statistics as whole products."""
    return statistics_flops(block) + direction_flops(block, preconditioner)


def step_of_muon(shape: tuple[int, int]) -> Products:
    """A step of torch's, with its five quintics."""
    param = nn.Parameter(torch.zeros(shape))
    param.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return products_of(torch.optim.Muon([param], lr=1e-3).step)


def step_of_deepspeeds(shape: tuple[int, int], method: str) -> Products:
    """An update by DeepSpeed's Muon; `method` is "standard", or "gram" for iterations on the Gram matrix."""
    from deepspeed.runtime.zero.muon.original_muon import muon_update

    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def update() -> Tensor:
        with torch.compiler.set_stance("force_eager"):
            found: Tensor = muon_update(grad, torch.zeros(shape), ns_method=method)
        return found

    return products_of(update)


def rows(side: int) -> list[list[str]]:
    shape = (side, side)
    found: list[tuple[str, Products, float | None]] = []
    for name in PRECONDITIONERS:
        counted, model = step_of_shampoo(shape, name)
        found.append((f'Shampoo, "{name}"', counted, model / (2 * side**3)))
    found.append(("Muon, torch", step_of_muon(shape), None))
    for method in ("standard", "gram"):
        found.append((f"Muon, DeepSpeed, {method}", step_of_deepspeeds(shape, method), None))
    return [
        [
            f"{name}, {side} x {side}",
            f"{counted.units(side):.2f}",
            "" if model is None else f"{model:.0f}",
            str(counted.calls),
            f"{counted.flops / 1e9:.3f}",
        ]
        for name, counted, model in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 512], help="of the square matrices")
    args = parser.parse_args()
    header = ("one step", "n^3 products", "cost model", "calls", "GFLOP")
    print(table(header, [row for side in args.sides for row in rows(side)]))
    print(
        "\nThe cost model counts statistics as whole products; above a side of 128 only a triangle of them is computed."
    )


if __name__ == "__main__":
    main()
