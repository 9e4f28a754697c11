"""Runs trials: `python -m benchmarks.directions direction=polar lr=0.01,0.02 seed=100,101`; commas make several.

Those that the file of results has are not run again. `--table` prints what it holds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.directions.trial import Trial, carry_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE[,VALUE]", help="of a trial, in place of the defaults")
    parser.add_argument("--results", type=Path, default=Path("runs/directions.jsonl"), help="default: %(default)s")
    parser.add_argument("--processes", type=int, default=1, help="of one thread each (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="print the results that are there, best first")
    args = parser.parse_args()
    done = read(args.results)
    if args.table:
        print_table(done)
        return
    known = [row["settings"] for row in done]
    trials = [trial for trial in parse(args.settings) if asdict(trial) not in known]
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with multiprocessing.Pool(args.processes, torch.set_num_threads, (1,)) as pool:
        for row in pool.imap_unordered(carry_out, trials):
            with args.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(line(row), flush=True)


def parse(settings: Iterable[str]) -> list[Trial]:
    """All combinations of the values."""
    pairs = [word.partition("=")[::2] for word in settings]
    choices = [[(key, value) for value in values.split(",")] for key, values in pairs]
    return [Trial.of(dict(chosen)) for chosen in itertools.product(*choices)]


def read(results: Path) -> list[dict[str, Any]]:
    """Earlier rows; settings that have been added since are at their defaults."""
    rows = [json.loads(text) for text in results.read_text().splitlines()] if results.exists() else []
    for row in rows:
        row["settings"] = asdict(Trial()) | row["settings"]
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """As Markdown, alike but for the seed in one row, best mean first."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["settings"]["seed"]):
        alike.setdefault(words(row, "seed"), []).append(row)
    print("| loss | seeds: loss | seconds of the optimizer | commits | settings |\n|---|---|---|---|---|")
    for settings, same in sorted(alike.items(), key=lambda item: mean(item[1])):
        seeds = ", ".join(f"{row['settings']['seed']}: {row['loss']:.4f}" for row in same)
        seconds = sum(row["optimizer_seconds"] for row in same) / len(same)
        commits = ", ".join(sorted({row["commit"] for row in same}))
        print(f"| {mean(same):.4f} | {seeds} | {seconds:.0f} | {commits} | {settings} |")


def mean(rows: list[dict[str, Any]]) -> float:
    return sum(row["loss"] for row in rows) / len(rows)


def line(row: dict[str, Any]) -> str:
    averaged = " ".join(f"{loss:.4f}" for loss in row["averaged"].values())
    return f"{row['loss']:.4f} [{averaged}] {row['cpu_seconds']:.0f} s ({row['optimizer_seconds']:.0f})  {words(row)}"


def words(row: dict[str, Any], *without: str) -> str:
    """The direction, and what is not as it is by default, as on a command line."""
    settings = row["settings"]
    changed = {"direction": settings["direction"], **Trial(**settings).differs()}
    return " ".join(
        f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in changed.items()
        if key not in without
    )


if __name__ == "__main__":
    main()
