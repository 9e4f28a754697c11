"""What this machine is, and how fast one thread multiplies and moves: the rates that floors divide by."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ds_shampoo.algorithm.precision import matmul_precision
from ds_shampoo.algorithm.products import multiply

FP32_BYTES = 4


def describe() -> dict[str, str | int | None]:
    """The processor, the versions and the thread count that a result has to be read with."""
    return {
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_model() -> str:
    """The processor's name: from Linux's /proc where there is one, else what the platform says."""
    table = Path("/proc/cpuinfo")
    for line in table.read_text().splitlines() if table.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def gemm_rate(order: int, dtype: torch.dtype = torch.float32, repeats: int = 8) -> float:
    """Flops per second of C = A B for square matrices of `order`, the operands staying in the cache.

    In fp32 by the kernels that the package itself multiplies with: torch's own may be slower.

    Warm operands make it the best rate that a block of this order can hope for, hence the strictest floor.
    """
    left, right, out = (torch.randn(order, order).to(dtype) for _ in range(3))
    if dtype == torch.float32:
        with matmul_precision("highest"):
            return _rate(lambda: multiply(left[None], right[None], out[None]), 2.0 * order**3, repeats)
    return _rate(lambda: torch.mm(left, right, out=out), 2.0 * order**3, repeats)


def _rate(work: Callable[[], object], flops: float, repeats: int) -> float:
    work()
    start = time.thread_time()
    for _ in range(repeats):
        work()
    return repeats * flops / (time.thread_time() - start)


class RateProbe:
    """Samples the fp32 gemm rate and the memory bandwidth, a little at a time between other timings.

    A processor's clock and its neighbours' use of the memory drift over a run; sampling between the steps
    lets the floor see what the contenders saw.
    """

    def __init__(self, order: int, numel: int) -> None:
        """
        Args:
            order: the square matrices' order, which is the block size.
            numel: elements of each of the triad's three arrays, which is the model's size.
        """
        self.order = order
        self._left, self._right, self._out = (torch.randn(numel) for _ in range(3))
        self.gemm: list[float] = []
        self.bandwidth: list[float] = []

    def sample(self, repeats: int = 3) -> None:
        """Takes one sample of each rate."""
        self.gemm.append(gemm_rate(self.order))
        torch.add(self._left, self._right, alpha=0.5, out=self._out)
        start = time.thread_time()
        for _ in range(repeats):
            torch.add(self._left, self._right, alpha=0.5, out=self._out)
        seconds = time.thread_time() - start
        # STREAM's convention for a triad: two arrays read, one written, no read-for-ownership counted.
        self.bandwidth.append(repeats * 3.0 * FP32_BYTES * self._out.numel() / seconds)

    @property
    def gemm_flops_per_second(self) -> float:
        return statistics.median(self.gemm)

    @property
    def bytes_per_second(self) -> float:
        return statistics.median(self.bandwidth)
