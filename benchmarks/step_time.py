"""Times optimizer steps on one thread, round-robin on the same real batches, against the arithmetic floor."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import machine, workload
from benchmarks.contenders import (
    BLOCK_SIZE,
    CONTENDERS,
    MUON,
    MUON_FP32,
    SCALABLE_SHAMPOO,
    SHAMPOO,
    SHAMPOO_MEDIUM,
    SOAP,
    Contender,
    Lane,
)
from benchmarks.floor import Floor, step_floor
from benchmarks.report import median, number, table
from ds_shampoo.algorithm.blocks import Block, cut
from gpt.data import Corpus

# Steps that are run but not counted: state is allocated and the allocator warms up.
UNCOUNTED_STEPS = 2
LR_WARMUP_STEPS = 20
LOSS_OVER_LAST = 10
PROBE_EVERY = 3
# What the median step without roots should stay within.
FLOOR_TARGET = 1.5
# And the mean step, the roots of others included, beside torch's Muon and the Shampoos of pytorch-optimizer.
MUON_TARGET = 1.0
PEER_TARGET = 0.25
# The longest step beside the median one.
MAX_TARGET = 1.5
PEERS = {MUON: MUON_TARGET, MUON_FP32: MUON_TARGET, SCALABLE_SHAMPOO: PEER_TARGET, SOAP: PEER_TARGET}
# Below this share of the fp32 gemm rate a processor only emulates bfloat16, and Muon's step takes seconds.
BF16_WORTH = 0.25


@dataclass(frozen=True, slots=True)
class Result:
    """What was measured of one contender; times in ms of processor time, the first steps left out."""

    name: str
    lr: float
    mean_ms: float
    median_ms: float
    max_ms: float
    without_roots_ms: float | None
    with_roots_ms: float | None
    root_thread_ms: float | None
    state_bytes: int
    loss: float
    step_ms: list[float]
    losses: list[float]

    @property
    def plain_ms(self) -> float:
        """The median step without roots; for an optimizer that has none, simply the median."""
        return self.median_ms if self.without_roots_ms is None else self.without_roots_ms


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(1)
    chosen = runnable(select(args.only), named=bool(args.only))
    if not chosen:
        raise SystemExit("nothing to time")
    print(", ".join(f"{key}: {value}" for key, value in machine.describe().items()))
    corpus = workload.corpus(args.data)
    print(f"text: {corpus.describe()}; {workload.TOKENS_PER_STEP} tokens a step, {args.steps} steps")
    lanes = [Lane(contender, workload.build_model(args.seed)) for contender in chosen]
    numel = sum(p.numel() for p in lanes[0].model.parameters())
    probe = machine.RateProbe(BLOCK_SIZE, numel)
    race(lanes, corpus, probe, args.steps, args.seed)
    results = [summarize(lane) for lane in lanes]
    floor = step_floor(model_blocks(lanes[0].model), numel, probe.gemm_flops_per_second, probe.bytes_per_second)
    print(f"model: {numel / 1e6:.2f}M parameters, {floor.blocks} blocks of {BLOCK_SIZE} at most\n")
    print(results_table(results))
    print()
    print("\n".join(floor_lines(floor, results)))
    if args.json:
        args.json.write_text(json.dumps(to_json(args, results, floor), indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    names = [contender.name for contender in CONTENDERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help=f"steps to run; the first {UNCOUNTED_STEPS} don't count")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"some of {', '.join(names)}")
    parser.add_argument("--data", type=Path, help="a text file or folder, in the corpus's place")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches")
    args = parser.parse_args()
    if args.steps <= UNCOUNTED_STEPS:
        parser.error(f"--steps must be above {UNCOUNTED_STEPS}, got {args.steps}")
    return args


def select(names: Sequence[str] | None) -> list[Contender]:
    return [contender for contender in CONTENDERS if names is None or contender.name in names]


def runnable(contenders: Sequence[Contender], named: bool) -> list[Contender]:
    """Those that can run here, with a line for each that can't.

    torch's Muon multiplies in bfloat16. Where the processor only emulates that, it is left out unless
    `named`, and its fp32 form, the same code with its one cast taken out, stands alone.
    """
    kept = []
    for contender in contenders:
        reason = contender.missing()
        if reason is None and contender is MUON and not named:
            reason = bf16_emulated()
        if reason is None:
            kept.append(contender)
        else:
            print(f"skipped {contender.name}: {reason}")
    return kept


def bf16_emulated() -> str | None:
    """Why torch's Muon would be timed unfairly on this processor, or None."""
    fp32, bf16 = machine.gemm_rate(BLOCK_SIZE), machine.gemm_rate(BLOCK_SIZE, torch.bfloat16, repeats=2)
    if bf16 >= BF16_WORTH * fp32:
        return None
    return (
        f"this processor multiplies bfloat16 at {bf16 / 1e9:.1f} GFLOP/s against {fp32 / 1e9:.1f} in fp32; "
        f"{MUON_FP32.name} stands for it (--only {MUON.name} runs it all the same)"
    )


def race(lanes: Sequence[Lane], corpus: Corpus, probe: machine.RateProbe, steps: int, seed: int) -> None:
    """Every lane takes every batch, the order rotating, with a sample of the machine's rates in between."""
    for step in range(steps):
        tokens, targets = workload.batch(corpus, seed, step)
        for turn in range(len(lanes)):
            lane = lanes[(step + turn) % len(lanes)]
            lane.step(tokens, targets, lr_scale=min(1.0, (step + 1) / LR_WARMUP_STEPS))
        if step % PROBE_EVERY == 0:
            probe.sample()
        if sys.stderr.isatty():
            print(f"\rstep {step + 1}/{steps} ", end="", file=sys.stderr, flush=True)


def summarize(lane: Lane) -> Result:
    contender = lane.contender
    counted = list(enumerate(lane.step_ms, start=1))[UNCOUNTED_STEPS:]
    times = [ms for _, ms in counted]
    has_roots = contender.root_interval is not None
    return Result(
        name=contender.name,
        lr=contender.lr,
        mean_ms=statistics.mean(times),
        median_ms=statistics.median(times),
        max_ms=max(times),
        without_roots_ms=median([ms for step, ms in counted if has_roots and not contender.takes_roots(step)]),
        with_roots_ms=median([ms for step, ms in counted if contender.takes_roots(step)]),
        root_thread_ms=lane.root_ms(),
        state_bytes=lane.state_bytes(),
        loss=statistics.mean(lane.losses[-LOSS_OVER_LAST:]),
        step_ms=lane.step_ms,
        losses=lane.losses,
    )


def model_blocks(model: nn.Module) -> list[Block]:
    """The blocks of every hidden matrix, as the package cuts them."""
    matrices = workload.hidden_matrices(model)
    cuts = [cut(name, p.shape, block_size=BLOCK_SIZE) for name, p in matrices.items()]
    return [block for parameter in cuts if parameter is not None for block in parameter.blocks]


def results_table(results: Sequence[Result]) -> str:
    header = (
        "optimizer",
        "lr",
        "mean",
        "median",
        "max",
        "without roots",
        "with roots",
        "root threads",
        "state MB",
        "loss",
    )
    rows = [
        [
            result.name,
            f"{result.lr:g}",
            number(result.mean_ms),
            number(result.median_ms),
            number(result.max_ms),
            number(result.without_roots_ms),
            number(result.with_roots_ms),
            number(result.root_thread_ms),
            number(result.state_bytes / 1e6),
            number(result.loss, 3),
        ]
        for result in results
    ]
    return (
        f"{table(header, rows)}\n"
        "Optimizer steps in ms of one thread's processor time, the first "
        f"{UNCOUNTED_STEPS} left out; with and without roots: medians;\n"
        "root threads: mean ms a step that they were busy, counted nowhere else; "
        f"loss: the last {LOSS_OVER_LAST} steps' mean."
    )


def floor_lines(floor: Floor, results: Sequence[Result]) -> list[str]:
    """The floor, and how far this package's steps lie from it and from its peers'."""
    lines = [
        f"floor of a step without roots: {floor.total_ms:.1f} ms",
        f"  products     {floor.products_ms:6.1f} ms = {floor.flops / 1e9:.2f} GFLOP (G Gᵀ in full) at "
        f"{floor.gemm_flops_per_second / 1e9:.1f} GFLOP/s",
        f"  elementwise  {floor.elementwise_ms:6.1f} ms = {floor.bytes / 1e6:.1f} MB at "
        f"{floor.bytes_per_second / 1e9:.1f} GB/s",
    ]
    by_name = {result.name: result for result in results}
    if (ours := by_name.get(SHAMPOO.name)) is not None:
        lines.append(verdict(f"{ours.name} without roots / the floor", ours.plain_ms, floor.total_ms, FLOOR_TARGET))
        lines.append(verdict(f"{ours.name}: max / median", ours.max_ms, ours.median_ms, MAX_TARGET))
    for ours in (by_name[c.name] for c in (SHAMPOO, SHAMPOO_MEDIUM) if c.name in by_name):
        for peer, target in PEERS.items():
            if (theirs := by_name.get(peer.name)) is not None:
                lines.append(verdict(f"{ours.name} / {peer.name}, means", ours.mean_ms, theirs.mean_ms, target))
    return lines


def verdict(what: str, ours_ms: float, theirs_ms: float, target: float) -> str:
    ratio = ours_ms / theirs_ms
    met = "met" if ratio <= target else "missed"
    return f"{what}: {ours_ms:.1f} / {theirs_ms:.1f} ms = {ratio:.2f} (target {target}: {met})"


def to_json(args: argparse.Namespace, results: Sequence[Result], floor: Floor) -> dict[str, object]:
    settings = {
        "steps": args.steps,
        "uncounted_steps": UNCOUNTED_STEPS,
        "seed": args.seed,
        "tokens_per_step": workload.TOKENS_PER_STEP,
        "block_size": BLOCK_SIZE,
        "lr_warmup_steps": LR_WARMUP_STEPS,
    }
    return {
        "machine": machine.describe(),
        "settings": settings,
        "results": [result_to_json(result) for result in results],
        "floor": floor.to_json(),
    }


def result_to_json(result: Result) -> dict[str, object]:
    return {name: getattr(result, name) for name in Result.__slots__}


if __name__ == "__main__":
    main()
