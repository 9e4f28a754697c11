"""What the optimizer keeps and takes per parameter, at every ZeRO stage, under the real engine on CPU ranks."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from benchmarks.allocations import allocations_of
from benchmarks.ranks import on_ranks
from benchmarks.report import table
from ds_shampoo.config import DTYPES
from gpt.model import GPT, GPTConfig

# Until then every block has its roots, and every buffer is there.
STEPS = 14
ROOT_INTERVAL = 10
# Bytes of factors and roots for each preconditioned parameter and rank: whole fp32 ones of square blocks.
TARGET = 16.0


@dataclass(frozen=True, slots=True)
class RankResult:
    """One rank's bytes.

    Attributes:
        moments: `exp_avg` and `exp_avg_sq`.
        preconditioner: factors and roots.
        workspace: kept on a CPU from step to step, for gathered blocks and directions.
        host: buffers of statistics and roots on their way to and from the root threads.
        step_peak: held at once during a step beyond what is kept.
    """

    moments: int
    preconditioner: int
    workspace: int
    host: int
    step_peak: int


@dataclass(frozen=True, slots=True)
class Row:
    """The rank that keeps most, in bytes per parameter times ranks; `preconditioner` per preconditioned parameter."""

    stage: int
    ranks: int
    moments: float
    preconditioner: float
    workspace: float
    host: float
    step_peak: float


def main() -> None:
    args = parse_arguments()
    print(", ".join(f"{key}: {value}" for key, value in machine.describe().items()))
    config = GPTConfig(layers=args.layers, d_model=args.d_model, heads=8, context=32)
    numel, inside = sizes(GPT(config), args.block_size)
    print(
        f"GPT of {args.layers} layers, d_model {args.d_model}: {numel / 1e6:.2f}M parameters, {inside / 1e6:.2f}M of "
        f"them in blocks of {args.block_size} at most; roots in {args.root_dtype}\n"
    )
    rows = [
        worst(stage, on_ranks(ranks, bytes_of_a_rank, vars(args), stage), numel, inside)
        for ranks in args.ranks
        for stage in args.stages
    ]
    print(results_table(rows))
    if args.json:
        found = {"machine": machine.describe(), "settings": vars(args), "rows": [asdict(row) for row in rows]}
        args.json.write_text(json.dumps(found, indent=1, default=str) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="world sizes")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], choices=range(4), help="ZeRO stages")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--d-model", type=int, default=512)
    parser.add_argument("--block-size", type=int, default=512)
    parser.add_argument("--root-dtype", choices=DTYPES, default="float32", help="in which roots are kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    return parser.parse_args()


def sizes(model: torch.nn.Module, block_size: int) -> tuple[int, int]:
    """The model's parameters, and those of them in blocks, by the table that the optimizer itself makes."""
    from ds_shampoo import Shampoo

    optimizer = Shampoo(model.parameters(), model=model, block_size=block_size)
    blocks = (block for unit in optimizer.subgroups() for block in unit.sharded.table.blocks)
    return sum(p.numel() for p in model.parameters()), sum(math.prod(block.shape) for block in blocks)


def bytes_of_a_rank(settings: dict[str, Any], stage: int) -> RankResult:
    """Counts after some steps, and what one more step takes."""
    import ds_shampoo

    torch.manual_seed(0)
    own = {key: settings[key] for key in ("block_size", "root_dtype")}
    params = {**own, "preconditioner": "shampoo", "root_interval": ROOT_INTERVAL, "root_threads": 1}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "Shampoo", "params": {"lr": 1e-4, **params}},
    }
    model = GPT(GPTConfig(layers=settings["layers"], d_model=settings["d_model"], heads=8, context=32))
    engine, *_ = ds_shampoo.initialize(model=model, config=config)
    optimizer = engine.basic_optimizer
    peaks = _watched(optimizer)
    tokens = torch.randint(256, (1, 33))
    for _ in range(STEPS):
        engine.backward(engine(tokens[:, :-1], tokens[:, 1:]))
        peaks.clear()
        engine.step()
    subgroups = optimizer.subgroups()
    stacks = [stack for subgroup in subgroups for stack in subgroup.sharded.stacks]
    return RankResult(
        moments=storage_bytes(state[key] for subgroup in subgroups for state in subgroup.states for key in _MOMENTS),
        preconditioner=storage_bytes(tensor for stack in stacks for tensor in [*stack.factors, *stack.roots]),
        workspace=optimizer.workspace_bytes,
        host=int(optimizer.metrics()["snapshot_bytes"]),
        step_peak=max(peaks),
    )


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes behind tensors; a storage that several share counts once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def worst(stage: int, results: Sequence[RankResult], numel: int, inside: int) -> Row:
    """The largest of each over the ranks, in bytes per parameter times ranks."""
    ranks = len(results)

    def most(name: str, parameters: int) -> float:
        return float(max(getattr(result, name) for result in results)) * ranks / parameters

    kept = {name: most(name, numel) for name in ("moments", "workspace", "host", "step_peak")}
    return Row(stage, ranks, preconditioner=most("preconditioner", inside), **kept)


def results_table(rows: Sequence[Row]) -> str:
    header = ("stage", "ranks", "moments", "factors and roots", "", "workspace", "host buffers", "peak of a step")
    lines = [
        [
            str(row.stage),
            str(row.ranks),
            f"{row.moments:.2f}",
            f"{row.preconditioner:.2f}",
            "met" if row.preconditioner <= TARGET * (1 + 1e-3) else "missed",
            f"{row.workspace:.2f}",
            f"{row.host:.2f}",
            f"{row.step_peak:.2f}",
        ]
        for row in rows
    ]
    return (
        f"{table(header, lines)}\n"
        "Bytes per parameter x ranks, of the rank that has most; factors and roots per preconditioned parameter "
        f"(target {TARGET:g}). workspace: kept between steps on CPUs only; peak: in a step, beyond what is kept."
    )


_MOMENTS = ("exp_avg", "exp_avg_sq")


def _watched(optimizer: Any) -> list[int]:
    """A list to which every later call of `optimizer.step` adds the peak of what it allocates."""
    peaks: list[int] = []
    plain = optimizer.step
    optimizer.step = lambda *given, **named: peaks.append(allocations_of(lambda: plain(*given, **named)).peak)
    return peaks


if __name__ == "__main__":
    main()
