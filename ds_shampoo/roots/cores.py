"""Which cores a rank's root threads run on: its own, beside those that its training threads use."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# How launchers tell a process its number among those of its machine, and how many these are: deepspeed and torchrun,
# Open MPI, MVAPICH, Intel MPI. Slurm has a table of all machines in the second's place.
_LAUNCHERS = (
    ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("LOCAL_RANK", "LOCAL_SIZE"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)

# More threads than this gain nothing where a rank's roots fit into half an interval anyway.
_MOST_BY_DEFAULT = 8


@dataclass(frozen=True, slots=True)
class CorePlan:
    """Where root threads run.

    Attributes:
        threads: how many of them.
        cores: what they are pinned to, together; the kernel balances them over these.
        crowding: what to warn of, if all ranks of this machine together have more threads than cores.
    """

    threads: int
    cores: tuple[int, ...]
    crowding: str | None


@dataclass(frozen=True, slots=True)
class Machine:
    """This rank's part of the machine.

    Attributes:
        affinity: the cores this process may run on.
        cores: how many cores the machine has.
        local_rank, local_ranks: of the ranks on this machine.
        training_threads: those that a rank computes with besides its root threads.
    """

    affinity: tuple[int, ...]
    cores: int
    local_rank: int
    local_ranks: int
    training_threads: int

    @property
    def own(self) -> tuple[int, ...]:
        """This rank's cores: its affinity where a launcher bound it to a part of the machine, else an equal share."""
        if len(self.affinity) <= self.cores // self.local_ranks:
            return self.affinity
        return share(self.affinity, self.local_rank, self.local_ranks)


def this_machine(training_threads: int, environment: Mapping[str, str] = os.environ) -> Machine:
    """Reads the machine and the launcher's environment."""
    cores = os.cpu_count() or 1
    affinity = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else tuple(range(cores))
    rank, ranks = local_place(environment)
    return Machine(affinity, cores, rank, ranks, training_threads)


def local_place(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """This process's number among the ranks of its machine, and how many these are; 0 of 1 if no launcher says so."""
    for number, count in _LAUNCHERS:
        if environment.get(count):
            ranks = int(environment[count])
            return min(max(int(environment.get(number) or 0), 0), ranks - 1), ranks
    counts = _slurm_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = int(environment.get("SLURM_NODEID") or 0)
    if node < len(counts):
        return int(environment.get("SLURM_LOCALID") or 0), counts[node]
    return 0, 1


def _slurm_counts(table: str) -> list[int]:
    """The tasks of each machine from Slurm's "8(x3),4"; none where it isn't that."""
    counts: list[int] = []
    for part in table.split(",") if table else ():
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            return []
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def plan_cores(machine: Machine, threads: int | None, cores: Sequence[int] | None) -> CorePlan:
    """Chooses the root threads' cores.

    Args:
        threads: `root_threads`; None takes one per core left over, up to 8.
        cores: `root_cores`, for all ranks of the machine; None takes this rank's own
            without the first `training_threads` of them, or all of its own where that leaves none.

    Raises:
        ValueError: for a core that this process may not use.
    """
    if cores is None:
        own = machine.own
        chosen = own[machine.training_threads :] or own
        spare = len(own) - machine.training_threads
    else:
        foreign = sorted(set(cores) - set(machine.affinity))
        if foreign:
            raise ValueError(
                f"root_cores: this process may not use the cores {format_cores(foreign)}, only "
                f"{format_cores(machine.affinity)}; a launcher that binds ranks to cores must leave them to it"
            )
        chosen = share(tuple(cores), machine.local_rank, machine.local_ranks)
        spare = len(chosen)
    count = threads or max(1, min(spare, _MOST_BY_DEFAULT))
    return CorePlan(count, chosen, _crowding(machine, count))


def share(cores: Sequence[int], rank: int, ranks: int) -> tuple[int, ...]:
    """A rank's consecutive part of the cores; where there are fewer cores than ranks, one that several ranks share."""
    if len(cores) < ranks:
        return (cores[rank % len(cores)],)
    return tuple(cores[len(cores) * rank // ranks : len(cores) * (rank + 1) // ranks])


def format_cores(cores: Sequence[int]) -> str:
    """Core numbers as a string like "0-3,8", which `root_cores` takes too."""
    runs: list[list[int]] = []
    for core in sorted(cores):
        if runs and core == runs[-1][-1] + 1:
            runs[-1].append(core)
        else:
            runs.append([core])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _crowding(machine: Machine, root_threads: int) -> str | None:
    needed = machine.local_ranks * (machine.training_threads + root_threads)
    available = machine.cores if machine.local_ranks > 1 else len(machine.affinity)
    if needed <= available:
        return None
    return (
        f"{machine.local_ranks} ranks x ({machine.training_threads} training + {root_threads} root) threads = {needed} "
        f"on {available} cores: training and roots will slow each other down; lower root_threads or OMP_NUM_THREADS"
    )
