"""What an optimizer's state takes on each rank, at every ZeRO stage, under the real engine, and the peak of a step.

deepspeed --num_gpus 2 benchmarks/memory.py
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import deepspeed
import deepspeed.comm as dist
from deepspeed.accelerator import get_accelerator

import ds_shampoo
from benchmarks import machine
from benchmarks.report import table
from gpt.model import GPT, GPTConfig

# Enough for the roots of every block to be in force.
STEPS = 14
# What the preconditioner's state should stay within, in bytes of an element and rank of an even share.
TARGET = 16.0


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of the fullest rank.

    Attributes:
        elements: of the model; preconditioned: of those, in blocks.
        adam: the moments, which Adam has too.
        factors, roots: of the rank's blocks.
        host: statistics and roots on their way to the host threads and back.
        step: allocated at most during one step beside what is there before and after it.
    """

    stage: int
    ranks: int
    elements: int
    preconditioned: int
    adam: int
    factors: int
    roots: int
    host: int
    step: int

    def per_element(self, name: str) -> float:
        """Bytes per element of an even share of the model."""
        return getattr(self, name) * self.ranks / self.elements

    @property
    def preconditioner(self) -> float:
        """Bytes of factors and roots per preconditioned element of an even share."""
        return (self.factors + self.roots) * self.ranks / self.preconditioned


def main() -> None:
    args = parse_arguments()
    deepspeed.init_distributed()
    found = [measured(stage, args) for stage in args.stages]
    if dist.get_rank() == 0:
        print(", ".join(f"{key}: {value}" for key, value in machine.describe().items()))
        print(results_table(found))
        if args.json:
            results = [asdict(memory) | {"preconditioner": memory.preconditioner} for memory in found]
            args.json.write_text(json.dumps({"machine": machine.describe(), "results": results}, indent=1) + "\n")


def measured(stage: int, args: argparse.Namespace) -> Memory:
    """Trains a few steps at a stage, and counts."""
    torch.manual_seed(0)
    params = {"lr": 1e-4, "block_size": args.block_size, "root_threads": 1}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "Shampoo", "params": params},
    }
    model = GPT(GPTConfig(args.layers, args.d_model, args.d_model // 64, context=32))
    engine, *_ = ds_shampoo.initialize(model=model, config=config)
    elements = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    tokens = torch.randint(256, (1, 33), device=engine.device)
    peak = 0
    for step in range(1, STEPS + 1):
        engine.backward(engine(tokens[:, :-1], tokens[:, 1:]))
        peak = peak_of(engine.step) if step == STEPS else engine.step() or 0
    memory = counted(engine.basic_optimizer, stage, elements, peak)
    engine.destroy()
    return memory


def counted(optimizer: ds_shampoo.Shampoo, stage: int, elements: int, step: int) -> Memory:
    """The state of the fullest rank."""
    units = optimizer.units()
    slots = {id(stack): stack for unit in units for _, stack, _, _ in unit.sharded.slots()}
    owned = [
        sum(
            value.nbytes
            for unit in units
            for state in unit.states
            for value in state.values()
            if torch.is_tensor(value)
        ),
        sum(factor.nbytes for stack in slots.values() for factor in stack.factors),
        sum(root.nbytes for stack in slots.values() for root in stack.roots),
        int(optimizer.metrics(sync=True)["snapshot_bytes"]),
        step,
    ]
    fullest = torch.tensor(owned, dtype=torch.float64)
    dist.all_reduce(fullest, op=dist.ReduceOp.MAX)
    blocks = {block for unit in units for block in unit.sharded.table.blocks}
    adam, factors, roots, host, peak = (int(value) for value in fullest.tolist())
    preconditioned = sum(block.numel for block in blocks)
    return Memory(stage, dist.get_world_size(), elements, preconditioned, adam, factors, roots, host, peak)


def peak_of(step: Any) -> int:
    """Bytes of tensors that a step allocates at most, over what there is before it."""
    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        accelerator.synchronize()
        before = accelerator.memory_allocated()
        accelerator.reset_peak_memory_stats()
        step()
        return int(accelerator.max_memory_allocated() - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate((nbytes for _, nbytes in changes), initial=0))


def results_table(found: list[Memory]) -> str:
    header = ("stage", "Adam's moments", "factors", "roots", "preconditioner", "host", "peak of a step")
    rows = [
        [
            str(memory.stage),
            f"{memory.per_element('adam'):.1f}",
            f"{memory.per_element('factors'):.1f}",
            f"{memory.per_element('roots'):.1f}",
            f"{memory.preconditioner:.1f}",
            f"{memory.per_element('host'):.1f}",
            f"{memory.per_element('step'):.1f}",
        ]
        for memory in found
    ]
    first = found[0]
    met = "met" if max(memory.preconditioner for memory in found) <= TARGET else "missed"
    return (
        f"{table(header, rows)}\n"
        f"Bytes on the fullest of {first.ranks} ranks per element of an even share of {first.elements / 1e6:.1f}M; "
        f"preconditioner: factors and roots, per element of the {first.preconditioned / 1e6:.1f}M in blocks "
        f"(target {TARGET:.0f}: {met})"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the launcher")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], help="ZeRO's")
    parser.add_argument("--layers", type=int, default=4, help="of the GPT")
    parser.add_argument("--d-model", type=int, default=512, help="of the GPT, a multiple of 64")
    parser.add_argument("--block-size", type=int, default=256, help="Shampoo's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
