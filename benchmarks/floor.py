"""The arithmetic floor of a Shampoo step without roots: the least time its products and its traffic need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from benchmarks.machine import FP32_BYTES
from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.algorithm.cost import direction_flops, statistics_flops

# Per element: read g, read and write exp_avg, read and write exp_avg_sq, read and write p.
ELEMENTWISE_ACCESSES = 7
# Per preconditioned element besides: write the filtered gradient into its block, read the direction back.
BLOCK_ACCESSES = 2


@dataclass(frozen=True, slots=True)
class Floor:
    """Flops and bytes of one step without roots, and the seconds they take at this machine's measured rates.

    What is counted:

    - every statistic and every direction as dense products, G Gᵀ as the full 2 n² m flops although symmetry
      would let a kernel do half of them: one that computes a triangle only can go below this floor;
    - for every element seven fp32 accesses (g, exp_avg, exp_avg_sq and p read, the last three written), which
      is what one fused pass over the model needs; for every preconditioned element two more, the filtered
      gradient written into its block and the direction read back. The norms of the graft need no further
      traffic: that of the Adam step is summed in the first pass, and the scaling happens in the second.

    What is not: the products' own traffic (gradients, factors and roots come from memory, the measured gemm
    rate has its operands in the cache), Python, dispatch, and everything that happens once a parameter.
    """

    blocks: int
    flops: float
    bytes: float
    gemm_flops_per_second: float
    bytes_per_second: float

    @property
    def products_ms(self) -> float:
        return 1e3 * self.flops / self.gemm_flops_per_second

    @property
    def elementwise_ms(self) -> float:
        return 1e3 * self.bytes / self.bytes_per_second

    @property
    def total_ms(self) -> float:
        return self.products_ms + self.elementwise_ms

    def to_json(self) -> dict[str, float]:
        times = ("products_ms", "elementwise_ms", "total_ms")
        return asdict(self) | {name: getattr(self, name) for name in times}


def step_floor(blocks: Iterable[Block], numel: int, gemm_flops_per_second: float, bytes_per_second: float) -> Floor:
    """The floor of one step without roots.

    Args:
        blocks: every preconditioned block of the model.
        numel: elements of the whole model, preconditioned or not.
    """
    blocks = list(blocks)
    in_blocks = sum(block.numel for block in blocks)
    return Floor(
        blocks=len(blocks),
        flops=sum(statistics_flops(block) + direction_flops(block, "shampoo") for block in blocks),
        bytes=float(FP32_BYTES * (ELEMENTWISE_ACCESSES * numel + BLOCK_ACCESSES * in_blocks)),
        gemm_flops_per_second=gemm_flops_per_second,
        bytes_per_second=bytes_per_second,
    )
