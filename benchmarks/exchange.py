"""What Shampoo's exchange moves per step beside ZeRO's own traffic, at every stage, under the real engine.

deepspeed --num_gpus 4 benchmarks/exchange.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed
import deepspeed.comm as dist

import ds_shampoo
from benchmarks.report import table
from gpt.model import GPT, GPTConfig

STEPS = 12
FP32_BYTES = 4
# Passes over all parameters that ZeRO itself makes, each rank moving (N - 1) / N of one: gradients are reduced and
# weights gathered; at stage 3 weights are gathered in the forward and in the backward pass.
ZERO_PASSES = {0: 2, 1: 2, 2: 2, 3: 3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.parse_args()
    deepspeed.init_distributed()
    ranks = dist.get_world_size()
    rows = [measured(stage, ranks) for stage in ZERO_PASSES]
    if dist.get_rank() == 0:
        print(table(("stage", "exchange MB", "ZeRO MB", "ratio"), rows))
        print(f"sent by the busiest of {ranks} ranks in one step; every element of ZeRO's counted as 4 bytes")


def measured(stage: int, ranks: int) -> list[str]:
    """One row: the exchange's bytes in a step with statistics and directions, and ZeRO's."""
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
    sent = torch.tensor(float(engine.basic_optimizer.metrics()["exchange_bytes"]))
    dist.all_reduce(sent, op=dist.ReduceOp.MAX)
    engine.destroy()
    zero = ZERO_PASSES[stage] * numel * FP32_BYTES * (ranks - 1) / ranks
    return [str(stage), f"{float(sent) / 1e6:.2f}", f"{zero / 1e6:.2f}", f"{float(sent) / zero:.3f}"]


if __name__ == "__main__":
    main()
