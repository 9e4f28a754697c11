"""Runs jobs through the `deepspeed` launcher, one per core, and skips those that are done."""

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
    """

    job: Job
    metric: Metric
    records: Sequence[Record]

    @property
    def final(self) -> float:
        """The metric at the run's end."""
        return float(self.records[-1][self.metric.key])


def run_all(jobs: Sequence[Job], runs: Path, cores: Sequence[int]) -> list[Result]:
    """The results of all jobs; those whose folder says that they were done with the same settings are only read.

    Args:
        runs: folder of all runs.
        cores: each job has one of them to itself, root threads included.

    Raises:
        JobError: for the first job that failed, after those under way have ended.
    """
    free: queue.SimpleQueue[int] = queue.SimpleQueue()
    for core in cores:
        free.put(core)

    def run(job: Job) -> Result:
        core = free.get()
        try:
            return run_job(job, runs, core)
        finally:
            free.put(core)

    with ThreadPoolExecutor(len(cores)) as pool:
        futures = [pool.submit(run, job) for job in jobs]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def run_job(job: Job, runs: Path, core: int) -> Result:
    """Runs one job on one core, unless it is done."""
    study = job.study
    folder = runs / study.name / job.name
    config = effective_config(job)
    identity = {"config": config, "program": study.program, "arguments": list(arguments(job))}
    done = folder / _DONE
    if not (done.exists() and json.loads(done.read_text()) == identity):
        folder.mkdir(parents=True, exist_ok=True)
        done.unlink(missing_ok=True)
        written = folder / "deepspeed.json"
        written.write_text(json.dumps(config, indent=2) + "\n")
        print(f"{study.name}: {job.name} on core {core}", flush=True)
        _launch(job, runs, written, core)
        done.write_text(json.dumps(identity, indent=2) + "\n")
    return read_result(job, folder)


def read_result(job: Job, folder: Path) -> Result:
    """What a finished run left."""
    metric = json.loads((folder / "config.json").read_text())["metric"]
    return Result(job, Metric(**metric), read_metrics(folder))


def effective_config(job: Job) -> dict[str, Any]:
    """The contender's JSON with the job's learning rate and overrides, and without pictures of its own."""
    config: dict[str, Any] = json.loads((ROOT / "configs" / job.contender.config).read_text())
    config["optimizer"]["params"] |= {"lr": job.lr, **dict(job.contender.overrides)}
    config.pop("tensorboard", None)
    return config


def arguments(job: Job) -> Sequence[str]:
    """The program's command line but for where things lie."""
    return (
        *job.study.arguments,
        *("--steps", str(job.schedule), "--seed", str(job.seed)),
        *("--eval-interval", str(job.eval_interval), "--save-interval", "0"),
    )


def _launch(job: Job, runs: Path, config: Path, core: int) -> None:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = str(probe.getsockname()[1])
    programs = Path(sys.executable).parent
    command = [
        *(programs / "deepspeed", "--num_gpus", "1", "--master_port", port),
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
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
    if done.returncode:
        end = "\n".join(log.read_text().splitlines()[-20:])
        raise JobError(f"{job.study.name} {job.name}: exit status {done.returncode}; the end of {log}:\n{end}")
