"""What a block costs in flops and bytes: one set of formulas for the owners' balance, reports and benchmarks."""

from __future__ import annotations

from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.algorithm.orthogonal import CUBIC_STEPS, STEPS
from ds_shampoo.algorithm.triangle import packed_numel

FP32_BYTES = 4

# fp64 eigh with reconstruction, in flops per n^3: 28.9 ms at n = 512 on a core that does 84 GF/s of dgemm.
ROOT_FLOPS_PER_CUBE = 18.0


def statistics_flops(block: Block) -> float:
    """One update of every Kronecker factor, counted as full products G Gᵀ."""
    return sum(2.0 * block.numel * dim for dim in block.factor_dims)


def direction_flops(block: Block, preconditioner: str) -> float:
    """One multiplication by every inverse root, and with "polar" cubic steps, each a Gram matrix and its product.

    "spectral" has quintic steps, with the Gram matrix's square besides, and a second multiplication after them.
    """
    rotation = sum(2.0 * block.numel * dim for dim in block.factor_dims)
    if preconditioner == "shampoo":
        return rotation
    rows = block.matrix_shape[0]
    order = min(rows, block.numel // rows)
    if preconditioner == "polar":
        return rotation + CUBIC_STEPS * 4.0 * order * block.numel
    return 2 * rotation + STEPS * (4.0 * order * block.numel + 2.0 * order**3)


def root_flops(block: Block) -> float:
    """One fp64 inverse root of every factor."""
    return sum(ROOT_FLOPS_PER_CUBE * dim**3 for dim in block.factor_dims)


def step_flops(block: Block, statistics_interval: int, root_interval: int, preconditioner: str) -> float:
    """The mean work of one step, which is what ownership balances."""
    direction = direction_flops(block, preconditioner)
    return statistics_flops(block) / statistics_interval + direction + root_flops(block) / root_interval


def state_bytes(block: Block, root_bytes: int = FP32_BYTES, differences: bool = False) -> int:
    """Factors, packed triangles in fp32, whole roots of so many bytes an element, a gradient for differences."""
    previous = FP32_BYTES * block.numel if differences else 0
    return previous + sum(FP32_BYTES * packed_numel(dim) + root_bytes * dim**2 for dim in block.factor_dims)
