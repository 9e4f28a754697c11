"""What all param groups of a rank share for their roots: the threads, the copies to the host, and the delay."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

import torch

from ds_shampoo.algorithm.preconditioners.defaults import usual_delay
from ds_shampoo.config import GroupSettings, SettingsError, ShampooConfig
from ds_shampoo.roots.cores import CorePlan, format_cores, plan_cores, this_machine
from ds_shampoo.roots.jobs import RootAnswer, RootJob
from ds_shampoo.roots.pool import ThreadPool
from ds_shampoo.roots.tasks import Executor, InlineExecutor, Task
from ds_shampoo.roots.transfer import HostCopy, Transfers

logger = logging.getLogger("ds_shampoo")


class RootService:
    """Takes root jobs and gives their answers when they are due.

    Attributes:
        device: where the blocks are.
        transfers: the copies between the device and the host.
    """

    def __init__(self, config: ShampooConfig, device: torch.device) -> None:
        """Chooses cores; threads start with the first job.

        Raises:
            SettingsError: for `root_cores` that this process may not use.
        """
        self.device = device
        self.transfers = Transfers(device)
        self._delay = config.root_delay
        self._step = 0
        self._plan: CorePlan | None = None
        self._pool: ThreadPool | None = None
        self._executor: Executor = InlineExecutor()
        if config.root_overlap:
            training = torch.get_num_threads() if device.type == "cpu" else 1
            wanted = None if config.root_cores == "auto" else config.root_cores
            try:
                self._plan = plan_cores(this_machine(training), config.root_threads, wanted)
            except ValueError as error:
                raise SettingsError(f"Shampoo setting {error}") from None
            threads, cores = self._plan.threads, self._plan.cores
            self._pool = ThreadPool(threads, cores, config.root_timeout, self.transfers.bind_thread)
            self._executor = self._pool

    def delay(self, settings: GroupSettings) -> int:
        """Steps from a root's boundary to the step at which it is put in force."""
        if self._delay is not None:
            return self._delay
        return usual_delay(settings.preconditioner, settings.root_interval) if self._pool is not None else 0

    def begin_step(self) -> None:
        """To be called before the step's first statistics, which would overwrite what snapshots still read."""
        self._step += 1
        self.transfers.fence()

    def submit(self, label: str, job: RootJob, delay: int) -> Task[RootAnswer]:
        """Begins a job that is due in `delay` steps; the earliest due and among them the largest go first."""
        task = Task(label, (self._step + delay, -job.order), partial(job.solve, self.transfers), job.snapshot.wait)
        self._executor.submit(task)
        return task

    def settle(self, task: Task[RootAnswer]) -> None:
        """Waits for a job's answer, or solves it here; may be called again after any exception.

        Raises:
            WorkerError: naming the block, where the job raised, there and here.
        """
        self._executor.settle(task)

    def collect(self, task: Task[RootAnswer], snapshot: HostCopy) -> RootAnswer:
        """The answer of a job that is settled; its snapshot's buffer is free again. Once for every job."""
        if not task.lost:
            self.transfers.release(snapshot)
        return task.answer()

    def drop(self, task: Task[RootAnswer], snapshot: HostCopy) -> None:
        """Gives up a job that nobody wants any more; its buffers are free again when nobody uses them."""
        task.cancelled = True
        if task.claim():
            self.transfers.release(snapshot)
        elif task.done:
            answer = self.collect(task, snapshot)
            if answer.root is not None:
                self.transfers.discard(answer.root)

    def describe(self) -> str:
        """One line for the table at start."""
        if self._plan is None:
            return "roots: computed within the step (root_overlap: false)"
        cores, threads = self._plan.cores, self._plan.threads
        return (
            f"roots: on {threads} host thread{'s' if threads > 1 else ''} of each rank; on this one "
            f"pinned to core{'s' if len(cores) > 1 else ''} {format_cores(cores)}"
        )

    def warn_of_crowding(self) -> None:
        """Logs once where all ranks of this machine together have more threads than cores."""
        if self._plan is not None and self._plan.crowding is not None:
            logger.warning("%s", self._plan.crowding)

    def metrics(self) -> Mapping[str, float]:
        """Counts since the start of this process: root_waits, root_wait_ms, roots_failed, and what is so now."""
        pool = self._pool
        return {
            "root_waits": pool.waits if pool else 0,
            "root_wait_ms": 1e3 * pool.wait_s if pool else 0.0,
            "roots_failed": self._executor.failed,
            "root_queue_depth": pool.queue_depth() if pool else 0,
            "root_busy_ms": 1e3 * pool.busy_s() if pool else 0.0,
            "root_threads_busy": pool.busy_share() if pool else 0.0,
            "snapshot_bytes": self.transfers.bytes,
        }
