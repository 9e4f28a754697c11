"""Which cores root threads get, on the machines that people have."""

from __future__ import annotations

import pytest

from ds_shampoo.roots.cores import Machine, format_cores, plan_cores, share, this_machine


def machine(affinity: range, cores: int, rank: int = 0, ranks: int = 1, training: int = 1) -> Machine:
    return Machine(tuple(affinity), cores, rank, ranks, training)


def test_one_process_leaves_training_its_threads() -> None:
    plan = plan_cores(machine(range(8), 8, training=5), None, None)
    assert (plan.threads, plan.cores, plan.crowding) == (3, (5, 6, 7), None)


def test_unbound_ranks_share_the_machine() -> None:
    plans = [plan_cores(machine(range(64), 64, rank, 8), None, None) for rank in range(8)]
    assert [plan.cores for plan in plans[:2]] == [tuple(range(1, 8)), tuple(range(9, 16))]
    assert all(plan.threads == 7 and plan.crowding is None for plan in plans)


def test_a_bound_rank_keeps_to_its_cores() -> None:
    plan = plan_cores(machine(range(16, 32), 64, 1, 4, training=2), None, None)
    assert (plan.threads, plan.cores) == (8, tuple(range(18, 32)))


def test_no_core_left_is_said_with_the_numbers() -> None:
    plan = plan_cores(machine(range(2), 2, 1, 2), None, None)
    assert (plan.threads, plan.cores) == (1, (1,))
    assert plan.crowding is not None
    assert plan.crowding.startswith("2 ranks x (1 training + 1 root) threads = 4 on 2 cores")
    few = plan_cores(machine(range(2), 2, 2, 3), None, None)
    assert few.cores == (0,)


def test_threads_and_cores_as_told() -> None:
    plan = plan_cores(machine(range(8), 8), 2, None)
    assert (plan.threads, plan.cores) == (2, tuple(range(1, 8)))
    plan = plan_cores(machine(range(8), 8, 1, 2), None, [0, 1, 6, 7])
    assert (plan.threads, plan.cores) == (2, (6, 7))
    with pytest.raises(ValueError, match=r"root_cores: this process may not use the cores 5,9-10, only 0-3"):
        plan_cores(machine(range(4), 16), None, [1, 5, 9, 10])


def test_shares_are_consecutive_and_cover_all() -> None:
    parts = [share(range(10), rank, 4) for rank in range(4)]
    assert [core for part in parts for core in part] == list(range(10))
    assert format_cores([8, 0, 1, 2, 10, 11]) == "0-2,8,10-11"


@pytest.mark.parametrize(
    "environment",
    [
        {"LOCAL_SIZE": "4", "LOCAL_RANK": "2"},
        {"LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x8)"},
        {"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "2"},
        {"MV2_COMM_WORLD_LOCAL_SIZE": "4", "MV2_COMM_WORLD_LOCAL_RANK": "2"},
        {"MPI_LOCALNRANKS": "4", "MPI_LOCALRANKID": "2"},
        {"SLURM_STEP_TASKS_PER_NODE": "8(x2),4,8", "SLURM_NODEID": "2", "SLURM_LOCALID": "2"},
    ],
)
def test_the_launchers_environment_is_read(environment: dict[str, str]) -> None:
    found = this_machine(3, environment)
    assert (found.local_rank, found.local_ranks, found.training_threads) == (2, 4, 3)
    assert found.affinity


@pytest.mark.parametrize(
    "environment", [{"LOCAL_RANK": "-1"}, {"SLURM_STEP_TASKS_PER_NODE": "many", "SLURM_LOCALID": "2"}, {}]
)
def test_a_process_that_no_launcher_started_is_alone(environment: dict[str, str]) -> None:
    alone = this_machine(1, environment)
    assert (alone.local_rank, alone.local_ranks) == (0, 1)
