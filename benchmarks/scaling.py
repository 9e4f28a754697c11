"""Milliseconds of the optimizer's step on each rank at several sizes of data parallelism, and what the ranks exchange.

One process starts the jobs, a rank a process of one thread, and prints how close to 1/N a rank's time falls.

    python benchmarks/scaling.py --ranks 1 2 4
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine
from benchmarks.report import number, table
from ds_shampoo.sharding.table import BlockTable

# Left out: state is allocated, and roots come into force.
UNCOUNTED_STEPS = 12


@dataclass(frozen=True, slots=True)
class Rank:
    """What one rank measured.

    Attributes:
        step_ms: processor time of its training thread in the median optimizer step; it sleeps while it waits for
            others, and its root thread's time is not in it.
        owned: its share of the step's flops.
        exchange_bytes: sent in a step.
        predicted_bytes: by who holds and who owns what: fp32 gradients and filtered gradients of pieces that others
            own, and directions for pieces that others hold.
    """

    ranks: int
    step_ms: float
    owned: float
    exchange_bytes: float
    predicted_bytes: float


def main() -> None:
    args = parse_arguments()
    if args.worker:
        work(args)
        return
    print(", ".join(f"{key}: {value}" for key, value in machine.describe().items()))
    found = {ranks: launch(ranks, args) for ranks in args.ranks}
    print(results_table(found))
    if args.json:
        results = {str(ranks): [asdict(rank) for rank in measured] for ranks, measured in found.items()}
        args.json.write_text(json.dumps({"machine": machine.describe(), "results": results}, indent=1) + "\n")


def launch(ranks: int, args: argparse.Namespace) -> list[Rank]:
    """Runs this file on so many ranks; returns what each wrote."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", ranks, "--standalone", __file__),
            *("--worker", folder, "--stage", args.stage, "--steps", args.steps, "--layers", args.layers),
            *("--d-model", args.d_model, "--block-size", args.block_size),
        ]
        done = subprocess.run(
            [str(part) for part in command],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            sys.exit(f"scaling: error: {ranks} ranks failed:\n{done.stdout[-3000:]}")
        return [Rank(**json.loads(file.read_text())) for file in sorted(Path(folder).glob("*.json"))]


def work(args: argparse.Namespace) -> None:
    """One rank of a job."""
    import deepspeed
    import deepspeed.comm as dist

    import ds_shampoo
    from ds_shampoo.algorithm.cost import step_flops
    from gpt.model import GPT, GPTConfig

    torch.set_num_threads(1)
    deepspeed.init_distributed(verbose=False)
    torch.manual_seed(0)
    params = {"lr": 1e-4, "block_size": args.block_size, "root_threads": 1}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": args.stage},
        "optimizer": {"type": "Shampoo", "params": params},
    }
    model = GPT(GPTConfig(args.layers, args.d_model, args.d_model // 64, context=32))
    engine, *_ = ds_shampoo.initialize(model=model, config=config)
    optimizer, tokens = engine.basic_optimizer, torch.randint(256, (1, 33), device=engine.device)
    step_ms = []
    for step in range(args.steps):
        engine.backward(engine(tokens[:, :-1], tokens[:, 1:]))
        dist.barrier()
        start = time.thread_time()
        engine.step()
        if step >= UNCOUNTED_STEPS:
            step_ms.append(1e3 * (time.thread_time() - start))
    units = optimizer.units()
    blocks = {block for unit in units for block in unit.sharded.table.blocks}
    owned = {slot[0] for unit in units for slot in unit.sharded.slots()}
    flops = {block: step_flops(block, 1, 10) for block in blocks}
    rank = Rank(
        ranks=dist.get_world_size(),
        step_ms=statistics.median(step_ms),
        owned=sum(flops[block] for block in owned) / sum(flops.values()),
        exchange_bytes=optimizer.metrics()["exchange_bytes"],
        predicted_bytes=sum(predicted_bytes(unit.sharded.table) for unit in units),
    )
    (args.worker / f"{dist.get_rank()}.json").write_text(json.dumps(asdict(rank)))
    dist.barrier()
    engine.destroy()


def predicted_bytes(table: BlockTable) -> int:
    """What this rank sends in a step, from the pieces that every rank holds and the blocks' owners alone."""
    me = table.partition.rank
    away = sum(piece.box.numel for piece in table.pieces if piece.rank == me != table.owners[piece.block])
    back = sum(piece.box.numel for piece in table.pieces if piece.rank != me == table.owners[piece.block])
    return machine.FP32_BYTES * (2 * away + back)


def results_table(found: dict[int, list[Rank]]) -> str:
    """The slowest rank of each size, against the smallest size's time over the number of ranks."""
    least = min(found)
    alone = max(rank.step_ms for rank in found[least]) * least
    rows = []
    for ranks, measured in found.items():
        slowest = max(rank.step_ms for rank in measured)
        rows.append(
            [
                str(ranks),
                number(slowest),
                number(slowest * ranks / alone, 2),
                number(max(rank.owned for rank in measured) * ranks, 2),
                number(max(rank.exchange_bytes for rank in measured) / 1e6, 2),
                number(max(rank.predicted_bytes for rank in measured) / 1e6, 2),
            ]
        )
    header = ("ranks", "step ms", "of 1/N", "share of flops x N", "exchange MB", "predicted MB")
    return (
        f"{table(header, rows)}\n"
        "The slowest rank's median step, in ms of its training thread's processor time; of 1/N: 1 is a perfect division"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="sizes of data parallelism")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), default=2, help="ZeRO's")
    parser.add_argument("--steps", type=int, default=32, help=f"the first {UNCOUNTED_STEPS} don't count")
    parser.add_argument("--layers", type=int, default=4, help="of the GPT")
    parser.add_argument("--d-model", type=int, default=512, help="of the GPT, a multiple of 64")
    parser.add_argument("--block-size", type=int, default=256, help="Shampoo's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
