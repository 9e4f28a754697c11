"""Runs jobs through the `deepspeed` launcher, a core for each rank, and skips those that are done."""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.evidence.protocol import Job
from metric import Metric
from recorder import Record, read_metrics

ROOT = Path(__file__).resolve().parents[2]

# A job's folder has this once it is finished: what it was run with.
_DONE = "evidence.json"
_CPU_DRIVEN = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}


class JobError(RuntimeError):
    """A job that failed; the message has the end of its output."""


@dataclass(frozen=True)
class Result:
    """A finished job.

    Attributes:
        metric: what the run is judged by.
        records: of its steps, oldest first.
        commit: the state of the code that ran it, where that is known.
    """

    job: Job
    metric: Metric
    records: Sequence[Record]
    commit: str | None = None

    @property
    def final(self) -> float:
        """The metric at the run's end."""
        return float(self.records[-1][self.metric.key])


def run_all(jobs: Sequence[Job], runs: Path, cores: Sequence[int]) -> list[Result]:
    """The results of all jobs; those whose folder says that they were done with the same settings are only read.

    Args:
        runs: folder of all runs.
        cores: each job has as many of them to itself as it has ranks, root threads included.

    Raises:
        JobError: for the first job that failed, after those under way have ended.
    """
    ranks = max((job.study.ranks for job in jobs), default=1)
    places = [frozenset(cores[at : at + ranks]) for at in range(0, len(cores) - ranks + 1, ranks)]
    if not places:
        raise JobError(f"{len(cores)} cores for jobs of {ranks} ranks: name as many with --cores at least")
    free: queue.SimpleQueue[frozenset[int]] = queue.SimpleQueue()
    for place in places:
        free.put(place)

    def run(job: Job) -> Result:
        place = free.get()
        try:
            return run_job(job, runs, place)
        finally:
            free.put(place)

    with ThreadPoolExecutor(len(places)) as pool:
        futures = [pool.submit(run, job) for job in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def run_job(job: Job, runs: Path, cores: frozenset[int]) -> Result:
    """Runs one job on these cores, unless it is done."""
    study = job.study
    folder = runs / study.name / job.name
    config = effective_config(job)
    identity = {"config": config, "program": study.program, "arguments": list(arguments(job)), "ranks": study.ranks}
    done = folder / _DONE
    found = json.loads(done.read_text()) if done.exists() else {}
    commit, present = found.pop("commit", None), present_commit()
    if found == identity:
        if commit != present:
            print(f"{study.name}: {job.name} is read, and was run by another state of the code: {commit}", flush=True)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        done.unlink(missing_ok=True)
        written = folder / "deepspeed.json"
        written.write_text(json.dumps(config, indent=2) + "\n")
        print(f"{study.name}: {job.name} on core {', '.join(map(str, sorted(cores)))}", flush=True)
        _launch(job, runs, written, cores)
        commit = present
        done.write_text(json.dumps(identity | {"commit": commit}, indent=2) + "\n")
    metric = json.loads((folder / "config.json").read_text())["metric"]
    return Result(job, Metric(**metric), read_metrics(folder), commit)


def present_commit() -> str | None:
    """The state of the code: git's name of it, "-dirty" where code differs from that; None outside of a repository."""
    name = _git("describe", "--always")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs")
    return f"{name}-dirty" if name and changed else name or None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def effective_config(job: Job) -> dict[str, Any]:
    """The contender's JSON with the job's learning rate and overrides, and without pictures of its own."""
    config: dict[str, Any] = json.loads((ROOT / "configs" / job.contender.config).read_text())
    config["optimizer"]["params"] |= {"lr": job.lr, **dict(job.contender.overrides)}
    if job.study.batch is not None:
        config["train_micro_batch_size_per_gpu"] = job.study.batch
    config.pop("tensorboard", None)
    return config


def arguments(job: Job) -> Sequence[str]:
    """The program's command line but for where things lie."""
    return (
        *job.study.arguments,
        *("--steps", str(job.schedule), "--seed", str(job.seed)),
        *("--eval-interval", str(job.eval_interval), "--save-interval", "0"),
    )


def _launch(job: Job, runs: Path, config: Path, cores: frozenset[int]) -> None:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    programs = Path(sys.executable).parent
    command = [
        *(programs / "deepspeed", "--num_gpus", job.study.ranks, "--master_port", port),
        *(ROOT / "launch" / job.study.program, "--deepspeed_config", config),
        *("--runs", runs / job.study.name, "--name", job.name, *arguments(job)),
    ]
    environment = os.environ | _CPU_DRIVEN
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
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
    if done.returncode:
        end = "\n".join(log.read_text().splitlines()[-20:])
        raise JobError(f"{job.study.name} {job.name}: exit status {done.returncode}; the end of {log}:\n{end}")
