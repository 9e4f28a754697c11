"""Which cores a rank's root threads run on: its own, beside those that its training threads use."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    """Reads the machine and the launcher's environment (`deepspeed`'s LOCAL_SIZE or `torchrun`'s LOCAL_WORLD_SIZE)."""
    cores = os.cpu_count() or 1
    affinity = tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else tuple(range(cores))
    ranks = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or 1)
    rank = min(max(int(environment.get("LOCAL_RANK") or 0), 0), ranks - 1)
    return Machine(affinity, cores, rank, ranks, training_threads)


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
