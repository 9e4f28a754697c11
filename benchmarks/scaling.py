"""Does the optimizer's step shrink as ranks are added? One model at dp 1, 2 and 4 under the real engine.

Every rank is a process with one thread; times are that thread's processor time, so that ranks may share cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from benchmarks.ranks import on_ranks
from benchmarks.report import table
from ds_shampoo.algorithm.blocks import Block
from ds_shampoo.algorithm.cost import direction_flops, statistics_flops
from ds_shampoo.sharding.exchange import choose_sources
from ds_shampoo.sharding.fragments import Piece
from ds_shampoo.step.stopwatch import PHASES
from gpt.model import GPT, GPTConfig

# Steps that are run but not counted: until then not every block has its roots.
UNCOUNTED_STEPS = 12
ROOT_INTERVAL = 10
FP32_BYTES = 4
# How far the busiest rank's time may lie above its share of the work, by the table of owners.
TARGET = 1.15


@dataclass(frozen=True, slots=True)
class RankResult:
    """One rank's step.

    Attributes:
        step_ms: the median of the training thread's processor time in the optimizer.
        flops, all_flops: of the products of its own blocks, and of all blocks.
        exchange_bytes, predicted_bytes: sent in a step; as counted, and by the table of owners.
        phases: median milliseconds of the wall clock by phase of the step.
    """

    step_ms: float
    flops: float
    all_flops: float
    exchange_bytes: int
    predicted_bytes: int
    phases: dict[str, float]


@dataclass(frozen=True, slots=True)
class Row:
    """The busiest rank at one world size; `share` is its part of all products, `ratio` its time over that at dp 1."""

    ranks: int
    step_ms: float
    ratio: float
    share: float
    exchange_bytes: int
    predicted_bytes: int
    phases: dict[str, float]


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    print(", ".join(f"{key}: {value}" for key, value in machine.describe().items()))
    print(
        f"GPT of {args.layers} layers, d_model {args.d_model}; blocks of {args.block_size}, ZeRO stage {args.stage}\n"
    )
    measured = {ranks: on_ranks(ranks, steps_of_a_rank, vars(args)) for ranks in args.ranks}
    rows = scaling(measured)
    print(results_table(rows))
    print()
    print(phases_table(rows))
    if args.json:
        found = {"machine": machine.describe(), "settings": vars(args), "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(found, indent=1, default=str) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="world sizes; the first is the measure")
    parser.add_argument("--stage", type=int, default=2, choices=range(4), help="ZeRO stage")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--block-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    return parser.parse_args()


def steps_of_a_rank(settings: dict[str, Any]) -> RankResult:
    """Trains on one rank's own random bytes and times the optimizer alone."""
    import ds_shampoo

    torch.manual_seed(0)
    own = {"preconditioner": "shampoo", "block_size": settings["block_size"]}
    params = {"lr": 1e-4, **own, "root_interval": ROOT_INTERVAL, "root_threads": 1}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": settings["stage"]},
        "optimizer": {"type": "Shampoo", "params": params},
    }
    model = GPT(GPTConfig(layers=settings["layers"], d_model=settings["d_model"], heads=8, context=32))
    engine, *_ = ds_shampoo.initialize(model=model, config=config)
    optimizer = engine.basic_optimizer
    clock = _timed(optimizer)
    tokens = torch.randint(256, (1, 33))
    found: list[dict[str, float]] = []
    for _ in range(UNCOUNTED_STEPS + settings["steps"]):
        engine.backward(engine(tokens[:, :-1], tokens[:, 1:]))
        clock.append(0.0)
        engine.step()
        found.append(optimizer.metrics(sync=True))
    tables = [unit.sharded.table for unit in optimizer.subgroups()]
    rank = tables[0].partition.rank
    blocks = [(block, owner) for table in tables for block, owner in zip(table.blocks, table.owners, strict=True)]
    return RankResult(
        step_ms=statistics.median(clock[UNCOUNTED_STEPS:]),
        flops=sum(_flops(block) for block, owner in blocks if owner == rank),
        all_flops=sum(_flops(block) for block, _ in blocks),
        exchange_bytes=int(optimizer.metrics()["exchange_bytes"]),
        predicted_bytes=sum(predicted_bytes(table.blocks, table.pieces, table.owners, rank) for table in tables),
        phases={
            phase: statistics.median(metrics[f"{phase}_ms"] for metrics in found[UNCOUNTED_STEPS:]) for phase in PHASES
        },
    )


def predicted_bytes(blocks: Sequence[Block], pieces: Sequence[Piece], owners: Sequence[int], rank: int) -> int:
    """What a rank sends in a step: gradients and vectors to owners, and directions to all who hold a part."""
    sources = choose_sources(blocks, pieces, owners)
    out = sum(piece.box.numel for piece in sources if piece.rank == rank != owners[piece.block])
    back = sum(piece.box.numel for piece in pieces if owners[piece.block] == rank != piece.rank)
    return FP32_BYTES * (2 * out + back)


def scaling(measured: dict[int, list[RankResult]]) -> list[Row]:
    """A row per world size, against the first of them."""
    alone = max(result.step_ms for result in next(iter(measured.values())))
    return [
        Row(
            ranks=ranks,
            step_ms=max(result.step_ms for result in results),
            ratio=max(result.step_ms for result in results) / alone,
            share=max(result.flops / result.all_flops for result in results),
            exchange_bytes=max(result.exchange_bytes for result in results),
            predicted_bytes=max(result.predicted_bytes for result in results),
            phases=max(results, key=lambda result: result.step_ms).phases,
        )
        for ranks, results in measured.items()
    ]


def results_table(rows: Sequence[Row]) -> str:
    header = ("ranks", "optimizer ms", "of the first", "share of products", "1/N", "exchange MB", "predicted MB", "")
    first = rows[0].share
    lines = [
        [
            str(row.ranks),
            f"{row.step_ms:.1f}",
            f"{row.ratio:.3f}",
            f"{row.share:.3f}",
            f"{1 / row.ranks:.3f}",
            f"{row.exchange_bytes / 1e6:.2f}",
            f"{row.predicted_bytes / 1e6:.2f}",
            "met" if row.ratio <= TARGET * row.share / first else "missed",
        ]
        for row in rows
    ]
    return (
        f"{table(header, lines)}\nThe busiest rank; met: its time is within {TARGET} times its share of the products."
    )


def phases_table(rows: Sequence[Row]) -> str:
    """Where a step goes; of those world sizes only whose ranks have a core each."""
    seen = [row for row in rows if row.ranks <= (os.cpu_count() or 1)]
    lines = [[str(row.ranks), *(f"{row.phases[phase]:.1f}" for phase in PHASES)] for row in seen]
    return f"{table(('ranks', *PHASES), lines)}\nMilliseconds of the wall clock, waiting for other ranks included."


def _flops(block: Block) -> float:
    return statistics_flops(block) + direction_flops(block, "shampoo")


def _timed(optimizer: Any) -> list[float]:
    """A list to whose last element every later call of `optimizer.step` adds its milliseconds."""
    clock: list[float] = []
    plain = optimizer.step

    def step(*arguments: Any, **named: Any) -> None:
        begin = time.thread_time()
        plain(*arguments, **named)
        clock[-1] += 1e3 * (time.thread_time() - begin)

    optimizer.step = step
    return clock


if __name__ == "__main__":
    main()
