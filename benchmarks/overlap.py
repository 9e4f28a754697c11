"""Does the step feel the roots? Training on one core, root threads on another, four ways in one run.

AdamW; Shampoo with its roots computed in the step; Shampoo with its roots on the other core; and the same Shampoo
whose roots are never refreshed, which is what overlap can at best be. With --root-throughput: how many roots a second
the pool gives, against a plain loop over the same matrices.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from benchmarks.report import number, table
from benchmarks.workload import windows
from ds_shampoo import Shampoo
from ds_shampoo.algorithm.inverse_roots import inverse_root
from ds_shampoo.roots.pool import Task, ThreadPool
from gpt.data import Corpus, load_corpus
from gpt.model import GPT, GPTConfig

BLOCK_SIZE = 512
ROOT_INTERVAL = 10
# A lane's steps follow each other for one interval, so that its roots compete with its own steps and no others.
SEGMENT = ROOT_INTERVAL

MEAN_TARGET = 1.15
P99_TARGET = 1.3
THROUGHPUT_TARGET = 0.95

ADAMW, INLINE, OVERLAP, STALE = (
    "AdamW",
    "Shampoo, roots in the step",
    "Shampoo, overlap",
    "Shampoo, roots never refreshed",
)


@dataclass(frozen=True, slots=True)
class Result:
    """Wall-clock ms of whole training steps: forward, backward and optimizer."""

    name: str
    steps: int
    mean_ms: float
    median_ms: float
    p99_ms: float
    max_ms: float
    optimizer_ms: float
    waits: int
    wait_ms: float


class Lane:
    """One way to train: its own model and optimizer, and its steps' times."""

    def __init__(self, name: str, optimizer: str, overlap: bool, root_core: int, layers: int) -> None:
        torch.manual_seed(0)
        self.name = name
        self.model: nn.Module = GPT(GPTConfig(layers=layers, d_model=BLOCK_SIZE, heads=8, context=256))
        if optimizer == "AdamW":
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        else:
            self.optimizer = Shampoo(
                self.model.parameters(),
                lr=2e-3,
                model=self.model,
                preconditioner="shampoo",
                block_size=BLOCK_SIZE,
                root_interval=ROOT_INTERVAL,
                root_overlap=overlap,
                root_threads=1,
                root_cores=[root_core],
            )
        self.step_ms: list[float] = []
        self.optimizer_ms: list[float] = []
        self._waited = (0, 0.0)

    def keep_roots(self) -> None:
        """No roots are begun from now on: those in force stay."""
        for subgroup in self.optimizer.subgroups():
            for keeper in subgroup.sharded._keepers:
                keeper.prepare = keeper.advance = lambda *_: None

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> None:
        begin = time.perf_counter()
        self.model.zero_grad(set_to_none=True)
        self.model(tokens, targets).backward()
        before = time.perf_counter()
        self.optimizer.step()
        end = time.perf_counter()
        self.step_ms.append(1e3 * (end - begin))
        self.optimizer_ms.append(1e3 * (end - before))

    def drain(self) -> None:
        """Lets the root thread come to rest before another lane is timed."""
        while isinstance(self.optimizer, Shampoo) and self.optimizer.metrics()["root_queue_depth"]:
            time.sleep(0.01)
        time.sleep(0.1)

    def start_counting(self) -> None:
        self.step_ms, self.optimizer_ms, self._waited = [], [], self._waits()

    def result(self) -> Result:
        waits, wait_ms = self._waits()
        return Result(
            self.name,
            len(self.step_ms),
            statistics.mean(self.step_ms),
            statistics.median(self.step_ms),
            percentile(self.step_ms, 0.99),
            max(self.step_ms),
            statistics.median(self.optimizer_ms),
            waits - self._waited[0],
            wait_ms - self._waited[1],
        )

    def _waits(self) -> tuple[int, float]:
        if not isinstance(self.optimizer, Shampoo):
            return 0, 0.0
        metrics = self.optimizer.metrics()
        return int(metrics["root_waits"]), metrics["root_wait_ms"]


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise SystemExit("two cores are needed: one to train on, one for the roots")
    print(", ".join(f"{key}: {value}" for key, value in machine.describe().items()))
    if args.root_throughput:
        numbers = root_throughput(cores, args.matrices)
    else:
        numbers = {"results": [asdict(result) for result in race(args, cores[0], cores[1])]}
    if args.json:
        args.json.write_text(json.dumps({"machine": machine.describe(), **numbers}, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--segments", type=int, default=4, help=f"timed segments of {SEGMENT} steps per lane")
    parser.add_argument("--tokens", type=int, default=4096, help="tokens a step, in windows of 256")
    parser.add_argument("--layers", type=int, default=2, help="layers of the GPT, d_model 512")
    parser.add_argument("--data", type=Path, help="a text file or folder, in the corpus's place")
    parser.add_argument("--root-throughput", action="store_true", help="time the pool alone")
    parser.add_argument("--matrices", type=int, default=32, help="matrices for --root-throughput")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    return parser.parse_args()


def race(args: argparse.Namespace, training_core: int, root_core: int) -> list[Result]:
    """All lanes on the same batches, a segment at a time, the order rotating."""
    corpus = load_corpus(args.data, 256)
    lanes = [
        Lane(ADAMW, "AdamW", False, root_core, args.layers),
        Lane(INLINE, "Shampoo", False, root_core, args.layers),
        Lane(OVERLAP, "Shampoo", True, root_core, args.layers),
        Lane(STALE, "Shampoo", True, root_core, args.layers),
    ]
    os.sched_setaffinity(0, {training_core})  # this thread's; the root threads pin themselves
    print(
        f"text: {corpus.describe()}; {args.tokens} tokens a step, {args.layers} layers of d_model {BLOCK_SIZE}, blocks "
        f"of {BLOCK_SIZE}, roots every {ROOT_INTERVAL} steps\ntraining on core {training_core}, root thread on core "
        f"{root_core}; segments of {SEGMENT} steps in turn"
    )
    warmup = 2  # after two intervals every block has its roots
    for segment in range(warmup + args.segments):
        for turn in range(len(lanes)):
            lane = lanes[(segment + turn) % len(lanes)]
            if segment == warmup:
                lane.start_counting()
                if lane.name == STALE:
                    lane.keep_roots()
            for step in range(segment * SEGMENT, (segment + 1) * SEGMENT):
                lane.step(*batch(corpus, step, args.tokens))
            lane.drain()
    results = [lane.result() for lane in lanes]
    print("\n" + results_table(results) + "\n")
    print("\n".join(verdicts(results)))
    return results


def batch(corpus: Corpus, step: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return windows(corpus, 256, 0, step, max(1, tokens // 256))


def results_table(results: Sequence[Result]) -> str:
    header = ("lane", "steps", "mean", "median", "p99", "max", "optimizer", "waits", "waited")
    rows = [
        [r.name, str(r.steps), *(number(v) for v in (r.mean_ms, r.median_ms, r.p99_ms, r.max_ms, r.optimizer_ms)),
         str(r.waits), number(r.wait_ms)]
        for r in results
    ]  # fmt: skip
    return table(header, rows) + "\nms of wall-clock time of whole steps; optimizer: the median of its part"


def verdicts(results: Sequence[Result]) -> list[str]:
    by_name = {result.name: result for result in results}
    overlap, stale = by_name[OVERLAP], by_name[STALE]
    mean, spikes = overlap.mean_ms / stale.mean_ms, overlap.p99_ms / overlap.median_ms
    return [
        f"overlap's mean / never refreshed: {mean:.3f} (target {MEAN_TARGET}: {met(mean <= MEAN_TARGET)})",
        f"overlap's p99 / its median: {spikes:.3f} (target {P99_TARGET}: {met(spikes <= P99_TARGET)})",
        f"overlap waited {overlap.wait_ms:.1f} ms (target 0: {met(overlap.wait_ms == 0)})",
        f"roots in the step: mean / never refreshed: {by_name[INLINE].mean_ms / stale.mean_ms:.3f}",
    ]


def root_throughput(cores: Sequence[int], count: int) -> dict[str, float]:
    """Roots a second of the pool, against plain loops over the same matrices on as many cores at the same time."""
    matrices = [statistic(seed) for seed in range(count)]
    print(f"{count} statistics of order {BLOCK_SIZE}, p = 4, fp64, one thread a core, best of 5, turn by turn")
    return measured(cores[:1], matrices) | measured(cores, matrices)


def measured(cores: Sequence[int], matrices: Sequence[torch.Tensor]) -> dict[str, float]:
    """Roots a second per core of both kinds of loop and of the pool, a thread on each of the cores."""
    pool = ThreadPool(len(cores), cores, timeout=600.0)
    ways: dict[str, Callable[[], None]] = {
        "eigh alone": lambda: looped(cores, matrices, lambda m: torch.linalg.eigh(m.double())),
        "eigh and X = V diag Vᵀ": lambda: looped(cores, matrices, plain_root),
        "the pool, every safeguard and probe": lambda: pooled(pool, matrices),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(5):
        for way, work in ways.items():
            seconds[way].append(timed(work))
    pool.close()
    rates = {way: len(matrices) / min(taken) / len(cores) for way, taken in seconds.items()}
    for way, rate in rates.items():
        print(f"{len(cores)} core{'s' * (len(cores) > 1)}  {way:36s} {rate:6.2f} roots/s per core")
    eigh, root, ours = rates.values()
    for against, rate in (("eigh and X", root), ("eigh alone", eigh)):
        reached = met(ours >= THROUGHPUT_TARGET * rate)
        print(f"         pool / loop of {against}: {ours / rate:.3f} (target {THROUGHPUT_TARGET}: {reached})")
    return {f"{way}, cores: {len(cores)}": rate for way, rate in rates.items()}


def looped(cores: Sequence[int], matrices: Sequence[torch.Tensor], solve: Callable[[torch.Tensor], object]) -> None:
    """Plain loops, a thread for each core."""

    def loop(core: int, share: Sequence[torch.Tensor]) -> None:
        torch.set_num_threads(1)
        os.sched_setaffinity(threading.get_native_id(), {core})
        for matrix in share:
            solve(matrix)

    threads = [threading.Thread(target=loop, args=(core, matrices[i :: len(cores)])) for i, core in enumerate(cores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def statistic(seed: int) -> torch.Tensor:
    """A gradient-like statistic, [BLOCK_SIZE, BLOCK_SIZE] fp32: a spectrum over six orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(BLOCK_SIZE, BLOCK_SIZE, generator=generator) * torch.logspace(0, -3, BLOCK_SIZE)
    return grad @ grad.mT


def plain_root(matrix: torch.Tensor) -> torch.Tensor:
    eigenvalues, vectors = torch.linalg.eigh(matrix.double())
    vectors = vectors * (eigenvalues + 1e-6 * eigenvalues[-1]).pow(-1 / 8)
    return vectors @ vectors.mT


def pooled(pool: ThreadPool, matrices: Sequence[torch.Tensor]) -> None:
    tasks = [Task(f"matrix {i}", (i,), lambda m=m: inverse_root(m, 4, 1e-6)) for i, m in enumerate(matrices)]
    for task in tasks:
        pool.submit(task)
    for task in tasks:
        pool.settle(task)
        task.answer()


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 100) * len(ordered) // 100) - 1))]


def met(reached: bool) -> str:
    return "met" if reached else "missed"


if __name__ == "__main__":
    main()
