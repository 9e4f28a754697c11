"""What Shampoo's exchange moves per step beside ZeRO's own traffic, at every stage, under the real engine.

deepspeed --num_gpus 4 benchmarks/exchange.py
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed
import deepspeed.comm as dist

import ds_shampoo
from benchmarks import machine
from benchmarks.report import table
from gpt.model import GPT, GPTConfig

STEPS = 12
FP32_BYTES = 4
# Passes over all parameters that ZeRO itself makes, each rank moving (N - 1) / N of one: gradients are reduced and
# weights gathered; at stage 3 weights are gathered in the forward and in the backward pass.
ZERO_PASSES = {0: 2, 1: 2, 2: 2, 3: 3}


@dataclass(frozen=True, slots=True)
class Row:
    """What the busiest rank sends in one step at a ZeRO stage: for the exchange, and for ZeRO itself."""

    stage: int
    exchange_bytes: float
    zero_bytes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    args = parser.parse_args()
    deepspeed.init_distributed()
    ranks = dist.get_world_size()
    rows = [measured(stage, ranks) for stage in ZERO_PASSES]
    if dist.get_rank() == 0:
        print(", ".join(f"{key}: {value}" for key, value in machine.describe().items()))
        print(results_table(rows))
        print(f"sent by the busiest of {ranks} ranks in one step; every element of ZeRO's counted as 4 bytes")
        if args.json:
            found = {"machine": machine.describe(), "ranks": ranks, "rows": [asdict(row) for row in rows]}
            args.json.write_text(json.dumps(found, indent=1) + "\n")


def measured(stage: int, ranks: int) -> Row:
    """A step with statistics and directions, under the engine at this stage."""
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "Shampoo", "params": {"lr": 1e-4, "block_size": 256, "root_threads": 1}},
    }
    engine, *_ = ds_shampoo.initialize(model=GPT(GPTConfig(context=32)), config=config)
    numel = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    tokens = torch.randint(256, (1, 33), device=engine.device)
    for _ in range(STEPS):
        engine.backward(engine(tokens[:, :-1], tokens[:, 1:]))
        engine.step()
    sent = torch.tensor(float(engine.basic_optimizer.metrics()["exchange_bytes"]), device=engine.device)
    dist.all_reduce(sent, op=dist.ReduceOp.MAX)
    engine.destroy()
    return Row(stage, float(sent), ZERO_PASSES[stage] * numel * FP32_BYTES * (ranks - 1) / ranks)


def results_table(rows: list[Row]) -> str:
    lines = [
        [
            str(row.stage),
            f"{row.exchange_bytes / 1e6:.2f}",
            f"{row.zero_bytes / 1e6:.2f}",
            f"{row.exchange_bytes / row.zero_bytes:.3f}",
        ]
        for row in rows
    ]
    return table(("stage", "exchange MB", "ZeRO MB", "ratio"), lines)


if __name__ == "__main__":
    main()
