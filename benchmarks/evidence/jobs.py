"""Runs jobs through the `deepspeed` launcher, a core for each rank, and skips those that are done."""

from __future__ import annotations

import json
import math
import os
import queue
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

from benchmarks.evidence.parts import folder_of
from benchmarks.evidence.protocol import Job
from metric import Metric
from recorder import Record, read_metrics

ROOT = Path(__file__).resolve().parents[2]

# Settings that are given in parts of the schedule's length, and to the program in steps.
OF_SCHEDULE = frozenset({"scheduler.warmup_num_steps", "momentum_warmup", "momentum_warmup_steps"})
_SCHEDULER = "scheduler."

# A job's folder has this once it is finished: what it was run with.
_DONE = "evidence.json"
# Of the processor: a clock on the wall would tell what else ran on this machine. Runs of earlier releases lack it.
_SECONDS = "processor_seconds"
_CPU_DRIVEN = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
# What the training loop says as it ends a run whose loss is no number.
_DIVERGED = re.compile(r"error: the loss is \S+ at step (\d+)")

T = TypeVar("T")
Given = TypeVar("Given")


class JobError(RuntimeError):
    """A job that failed; the message has the end of its output."""


@dataclass(frozen=True)
class Result:
    """A finished job.

    Attributes:
        metric: what the run is judged by.
        records: of its steps, oldest first.
        commit: the state of the code that ran it, where that is known.
        diverged: the step at which its loss was no number any more; None for a run that came to its end.
    """

    job: Job
    metric: Metric
    records: Sequence[Record]
    commit: str | None = None
    diverged: int | None = None

    @property
    def final(self) -> float:
        """The metric at the run's end, nan where it diverged."""
        return math.nan if self.diverged is not None else float(self.records[-1][self.metric.key])

    @property
    def score(self) -> float:
        """The same, so turned that less is better; inf where it diverged or is no number."""
        if math.isnan(self.final):
            return math.inf
        return self.final if self.metric.better == "lower" else -self.final

    @property
    def seconds(self) -> float:
        """Of the processor in training, until its end."""
        return float(self.records[-1]["seconds"]) if self.records else 0.0


class Cores:
    """Cores that jobs are run on; each job has as many to itself as it has ranks, root threads included."""

    def __init__(self, runs: Path, cores: Sequence[int], ranks: int = 1) -> None:
        """
        Args:
            runs: folder of all runs.

        Raises:
            JobError: for fewer cores than a job has ranks.
        """
        self._runs = runs
        places = [frozenset(cores[at : at + ranks]) for at in range(0, len(cores) - ranks + 1, ranks)]
        if not places:
            raise JobError(f"{len(cores)} cores for jobs of {ranks} ranks: name as many with --cores at least")
        self._free: queue.SimpleQueue[frozenset[int]] = queue.SimpleQueue()
        for place in places:
            self._free.put(place)
        self._stopped = Event()

    def run(self, job: Job) -> Result:
        """A job's result, as soon as a place is free; one that was done with the same settings is only read.

        Raises:
            JobError: if it failed, or another one did while this one waited.
        """
        place = self._free.get()
        try:
            if self._stopped.is_set():
                raise JobError("another job failed")
            return run_job(job, self._runs, place)
        except BaseException:
            self._stopped.set()
            raise
        finally:
            self._free.put(place)

    def each(self, function: Callable[[Given], T], given: Iterable[Given]) -> list[T]:
        """What a function that runs jobs returns for each, all at work beside each other.

        Raises:
            JobError: for the first job that failed, after those under way have ended.
        """
        given = list(given)
        with ThreadPoolExecutor(max(1, len(given))) as pool:
            futures = [pool.submit(function, each) for each in given]
            try:
                return [future.result() for future in futures]
            except BaseException:
                self._stopped.set()
                raise


def run_job(job: Job, runs: Path, cores: frozenset[int]) -> Result:
    """Runs one job on these cores, unless it is done."""
    study = job.study
    folder = runs / study.name / job.name
    config = effective_config(job)
    identity = {"config": config, "program": study.program, "arguments": list(arguments(job)), "ranks": study.ranks}
    done = folder / _DONE
    timed = done.exists() and all(_SECONDS in record for record in read_metrics(folder))
    found = json.loads(done.read_text()) if timed else {}
    ended = {key: found.pop(key, None) for key in ("commit", "diverged")}
    present = present_commit()
    if found == identity:
        if ended["commit"] != present:
            other = f"was run by another state of the code: {ended['commit']}"
            print(f"{study.name}: {job.name} is read, and {other}", flush=True)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        done.unlink(missing_ok=True)
        written = folder / "deepspeed.json"
        written.write_text(json.dumps(config, indent=2) + "\n")
        print(f"{study.name}: {job.name} on core {', '.join(map(str, sorted(cores)))}", flush=True)
        ended = {"commit": present, "diverged": _launch(job, runs, written, cores)}
        done.write_text(json.dumps(identity | ended, indent=2) + "\n")
    metric = json.loads((folder / "config.json").read_text())["metric"]
    records = [{**record, "seconds": record[_SECONDS]} for record in read_metrics(folder)]
    return Result(job, Metric(**metric), records, **ended)


def present_commit() -> str | None:
    """The state of the code: git's name of it, "-dirty" where code differs from that; None outside of a repository."""
    name = _git("describe", "--always")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs")
    return f"{name}-dirty" if name and changed else name or None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def effective_config(job: Job) -> dict[str, Any]:
    """The study's JSON with the contender's optimizer in it, and without pictures of its own."""
    config: dict[str, Any] = json.loads((ROOT / "configs" / job.study.config).read_text())
    config.pop("tensorboard", None)
    if job.study.ranks == 1:
        # One rank has nobody to share with, and some contenders need whole matrices.
        config.pop("zero_optimization", None)
    if job.batch is not None:
        config["train_micro_batch_size_per_gpu"] = job.batch
    params: dict[str, Any] = {}
    lists: dict[str, dict[int, Any]] = {}
    for key, value in job.settings.items():
        if key in OF_SCHEDULE:
            value = round(value * job.schedule)
        name, _, place = key.rpartition(".")
        if key.startswith(_SCHEDULER):
            config["scheduler"]["params"][place] = max(1, value) if key in OF_SCHEDULE else value
        elif name:
            lists.setdefault(name, {})[int(place)] = value
        else:
            params[key] = value
    params |= {name: [values[place] for place in sorted(values)] for name, values in lists.items()}
    config["optimizer"] = {"type": job.contender.type, "params": params}
    return config


def arguments(job: Job) -> Sequence[str]:
    """The program's command line but for where its results lie."""
    return (
        *job.study.arguments,
        *("--data", os.path.relpath(folder_of(job.corpus), ROOT)),
        *("--steps", str(job.schedule), "--seed", str(job.seed)),
        *("--eval-interval", str(job.eval_interval), "--save-interval", "0"),
    )


def _launch(job: Job, runs: Path, config: Path, cores: frozenset[int]) -> int | None:
    """Runs the program; returns the step at which it diverged, or None."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    programs = Path(sys.executable).parent
    command = [
        *(programs / "deepspeed", "--num_gpus", job.study.ranks, "--master_port", port),
        *(ROOT / "launch" / job.study.program, "--deepspeed_config", config),
        *("--runs", runs.resolve() / job.study.name, "--name", job.name, *arguments(job)),
    ]
    environment = os.environ | _CPU_DRIVEN
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    # Where a contender's class is one of this folder's.
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    log = config.with_name("log.txt")
    with log.open("w") as output:
        done = subprocess.run(
            [str(part) for part in command],
            env=environment,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    if not done.returncode:
        return None
    diverged = _DIVERGED.search(log.read_text())
    if diverged:
        return int(diverged[1])
    end = "\n".join(log.read_text().splitlines()[-20:])
    raise JobError(f"{job.study.name} {job.name}: exit status {done.returncode}; the end of {log}:\n{end}")
